"""Makes a module from the hyperparameters in a checkpoint, as Lightning's ``load_from_checkpoint``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_mimo.checkpoint.directory import TRAINER, read_manifest
from lightning_mimo.errors import ConfigError


def check_options(kind: type, *, map_location: Any, hparams_file: Any, strict: bool | None) -> None:
    """Refuse what Lightning's ``load_from_checkpoint`` takes and a sharded checkpoint has no use for.

    Args:
        kind: class of the module.
        map_location: must be ``None``.
        hparams_file: must be ``None``.
        strict: must not be ``False``.

    Raises:
        ConfigError: naming the option.
    """
    for option, value in (("map_location", map_location), ("hparams_file", hparams_file)):
        if value is not None:
            raise ConfigError(f"{kind.__name__}.load_from_checkpoint({option}=...) is not supported. Leave it out.")
    if strict is False:
        raise ConfigError(
            f"{kind.__name__}.load_from_checkpoint(strict=False) is not supported. Leave it out, and write "
            f"{kind.__name__}(init_from=path, init_missing=[...]) for a checkpoint that does not hold everything."
        )


def saved_hyperparameters(path: Path) -> dict[str, Any]:
    """Read what ``save_hyperparameters()`` kept in a checkpoint; empty if nothing.

    Raises:
        CheckpointError: if there is no checkpoint.
    """
    read_manifest(path)
    trainer = torch.load(path / TRAINER, weights_only=True, map_location="cpu") if (path / TRAINER).exists() else {}
    return dict(trainer.get("hyper_parameters", {}))


def arguments_of(kind: type, saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a module's constructor: those of a checkpoint, replaced by those that are given.

    Args:
        kind: class of the module.
        saved: its hyperparameters; those that are no arguments are left out, as in Lightning.
        given: arguments of the user's.

    Raises:
        ConfigError: naming an argument that has no value.
    """
    parameters = inspect.signature(kind).parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    arguments = {key: value for key, value in saved.items() if takes_any or key in parameters} | dict(given)
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for name, parameter in parameters.items():
        if parameter.kind in plain and parameter.default is inspect.Parameter.empty and name not in arguments:
            raise ConfigError(
                f"{kind.__name__}.load_from_checkpoint: the checkpoint does not hold the argument {name!r}. Call "
                f"save_hyperparameters() in {kind.__name__}.__init__, or load_from_checkpoint(path, {name}=...)."
            )
    return arguments

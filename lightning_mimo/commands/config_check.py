"""Checks of a parsed config that neither jsonargparse nor Lightning makes, or makes too late."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_mimo.checkpoint.directory import read_manifest
from lightning_mimo.checkpoint.replacement import before_replacement
from lightning_mimo.commands.yaml_file import read_value, read_yaml
from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MOST_RANKS

_LONGEST_NAME = 255  # bytes, of every file system in use
_CHOSEN_BY_LIGHTNING = ("best", "last", "hpc")
# The least value of numbers of the Trainer; -1 is without a limit.
_LEAST = {
    "num_nodes": 1,
    "accumulate_grad_batches": 1,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
    "max_epochs": -1,
    "min_epochs": 0,
    "max_steps": -1,
    "min_steps": 0,
    "check_val_every_n_epoch": 1,
    "reload_dataloaders_every_n_epochs": 0,
}
_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")


def restore_whole_numbers(trainer: Namespace, arguments: Sequence[str]) -> None:
    """Give limits of batches as a whole number where they were written so: 1 is one batch, and 1.0 is all of them.

    The parser takes the first type of a union that fits. Python keeps one ``Optional[Union[...]]`` for all orders of
    its members, so the packages of an environment decide whether the Trainer's limits are ``int`` or ``float`` first.

    Args:
        trainer: parsed arguments of the Trainer, changed in place.
        arguments: of the command line, without the command.
    """
    written: dict[str, Any] = {}
    for argument, following in pairwise([*arguments, ""]):
        key, equals, value = argument.partition("=")
        value = value if equals else following
        if key in ("--config", "-c"):
            of_file = read_yaml(value).get("trainer")
            written |= of_file if isinstance(of_file, dict) else {}
        elif key.removeprefix("--trainer.") in _LIMITS:
            written[key.removeprefix("--trainer.")] = read_value(value, key)
    for name in _LIMITS:
        number = written.get(name)
        if isinstance(number, int) and not isinstance(number, bool) and trainer.get(name) == number:
            trainer[name] = number


def check_numbers(trainer: Namespace) -> None:
    """Check the ranges of the Trainer's numbers, and the number of ranks before a list of devices is made.

    Args:
        trainer: parsed arguments of the Trainer.

    Raises:
        ConfigError: naming the key and the range.
    """
    for name, least in _LEAST.items():
        value = trainer.get(name)
        if value is not None and not least <= value < 2**63:
            raise ConfigError(f"trainer.{name}={value} must be a whole number of at least {least}.")
    for name in _LIMITS:
        value = trainer.get(name)
        if value is not None and not (0 <= value <= 1 if isinstance(value, float) else 0 <= value < 2**63):
            raise ConfigError(
                f"trainer.{name}={value} must be a whole number of batches, or a part of them from 0.0 to 1.0."
            )
    interval = trainer.get("val_check_interval")
    if isinstance(interval, int | float) and not (0 < interval <= 1 if isinstance(interval, float) else interval >= 1):
        raise ConfigError(
            f"trainer.val_check_interval={interval} must be a whole number of batches of at least 1, a part of an "
            f"epoch up to 1.0, or a time."
        )
    clip = trainer.get("gradient_clip_val")
    if clip is not None and not 0 <= clip < float("inf"):
        raise ConfigError(f"trainer.gradient_clip_val={clip} must be a number of at least 0.")
    devices = str(trainer.get("devices"))
    nodes = trainer.get("num_nodes") or 1
    if devices.lstrip("+-").isdecimal() and not (devices == "-1" or 1 <= int(devices) * nodes <= MOST_RANKS):
        raise ConfigError(
            f"trainer.devices={devices} with trainer.num_nodes={nodes}: write the number of devices of one node, at "
            f"least 1 and at most {MOST_RANKS:,} over all nodes."
        )


def check_options(trainer: Namespace) -> None:
    """Check that groups of options of the strategy have keys and values; jsonargparse accepts any value.

    Args:
        trainer: parsed arguments of the Trainer.

    Raises:
        ConfigError: naming the key.
    """
    options = trainer.get("strategy.init_args") if isinstance(trainer.get("strategy"), Namespace) else None
    for name in ("checks", "saving", "monitoring"):
        value = None if options is None else options.get(name)
        if options is not None and name in options and not isinstance(value, Namespace):
            raise ConfigError(f"trainer.strategy.init_args.{name} must have keys and values, but is {value!r}.")


def check_ckpt_path(path: str | Path | None) -> None:
    """Check that a checkpoint to resume or evaluate is one, if its path is given.

    Raises:
        CheckpointError: if it is not a complete checkpoint.
        ConfigError: if the path is empty.
    """
    if path is None or str(path) in _CHOSEN_BY_LIGHTNING or ":" in str(path):  # a colon: not on the local file system
        return
    if not str(path).strip("\0 "):
        raise ConfigError(f"ckpt_path={str(path)!r} must be the path of a checkpoint, 'best' or 'last'.")
    if not os.path.lexists(path) and before_replacement(Path(path)).exists():
        return  # an interrupted save, which loading completes
    read_manifest(Path(path))


def check_root_dir(folder: str | Path | None) -> None:
    """Check that the folder of logs and checkpoints can be created and written, before any process starts.

    Raises:
        ConfigError: naming the folder that is in the way.
    """
    if folder is None or ":" in str(folder):  # a colon: not on the local file system
        return
    existing = Path(folder).absolute()
    if "\0" in str(folder) or any(len(os.fsencode(part)) > _LONGEST_NAME for part in existing.parts):
        raise ConfigError(f"trainer.default_root_dir={str(folder)[:60]!r}… is not the name of a folder.")
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise ConfigError(f"trainer.default_root_dir={str(folder)!r}: {existing} is not a folder that can be written.")

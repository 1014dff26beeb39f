"""Rejects what MimoStrategy does not support in a module, before any process starts as far as it is known then."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from lightning_mimo.checkpoint.saving import is_plain
from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.dtypes import DtypePolicy
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.own_state import check_own_parameters

_USE_MICROBATCHES = ("training_step", "validation_step", "test_step", "forward", "loss")
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def check_module(module: pl.LightningModule, trainer: pl.Trainer) -> None:
    """Check the methods, options, hyperparameters and own parameters of a module.

    Args:
        module: the module, in which ``configure_model`` may have been called or not.
        trainer: the Trainer that runs it.

    Raises:
        ConfigError: naming what is not supported, and the remedy.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise ConfigError(
            f"{name}.automatic_optimization=False is not supported by MimoStrategy: the pipeline "
            f"schedule runs the backward passes. Leave it out, and override loss() and configure_optimizers()."
        )
    if not module.strict_loading:
        raise ConfigError(
            f"{name}.strict_loading=False is not supported by MimoStrategy: a checkpoint is loaded if it holds exactly "
            f"the parameters of the model, and refused otherwise. Leave it out; to begin with weights that are not "
            f"complete, write {name}(init_from=path, init_missing=[...])."
        )
    for step in _STEPS:
        signature = inspect.signature(getattr(module, step))
        if not (_accepts(signature, 2) or _accepts(signature, 3)):  # the third is dataloader_idx
            raise ConfigError(
                f"{name}.{step}{signature} does not take what MimoStrategy gives it, a microbatch and "
                f"the number of its batch. Write def {step}(self, batch, batch_idx)."
            )
    check_own_parameters(module)
    _check_hyperparameters(name, module.hparams)
    if (data := getattr(trainer, "datamodule", None)) is not None:
        _check_hyperparameters(type(data).__name__, data.hparams)


def check_module_for(module: MimoModule, layout: MimoLayout, dtype_policy: DtypePolicy) -> None:
    """Check that a module can run in a layout. Needs no process group.

    Args:
        module: the user's module.
        layout: what runs where.
        dtype_policy: the dtypes of the run.

    Raises:
        ConfigError: if an earlier Trainer has built the model for another layout or precision, or weights cannot be
            used; a LayoutError if the model cannot run in the layout; a CheckpointError if files are damaged.
    """
    _check_built_for(module, layout, dtype_policy)
    module.check_layout(layout)
    module.check_weights(layout)


def _check_built_for(module: MimoModule, layout: MimoLayout, dtype_policy: DtypePolicy) -> None:
    if module.built_for is None or module.built_for == (layout, dtype_policy):
        return
    what, name = "layout" if module.built_for[0] != layout else "precision", type(module).__name__
    raise ConfigError(
        f"This {name} was built by an earlier Trainer for another {what}, whose shards its model holds. Save a "
        f"checkpoint there, make a new {name}, and give it to this Trainer with ckpt_path=...: a checkpoint can be "
        f"loaded in any layout."
    )


def as_mimo_module(module: pl.LightningModule | None) -> MimoModule:
    """Return a Trainer's module as a MimoModule.

    Raises:
        ConfigError: if it is not a MimoModule.
    """
    if not isinstance(module, MimoModule):
        raise ConfigError(
            f"MimoStrategy trains a MimoModule, but got a {type(module).__name__}. Subclass "
            f"lightning_mimo.MimoModule and override configure_mimo."
        )
    return module


def check_takes_packed(module: MimoModule) -> None:
    """Refuse packed microbatches where a module would misread them. Needs no process group.

    Raises:
        ConfigError: if the class has steps or a loss of its own and does not say that they take such microbatches, or
            the model does not keep the samples of a row apart.
    """
    kind = type(module)
    own = [name for name in _USE_MICROBATCHES if getattr(kind, name) is not getattr(MimoModule, name)]
    if module.takes_packed is False or (own and module.takes_packed is None):
        what = f"has its own {own[0]}()" if own else "says takes_packed = False"
        raise ConfigError(
            f"MimoStrategy(pack_to=...) puts several samples into one row, [1, tokens], and {kind.__name__} {what}. If "
            f"it is right for such microbatches (batch['lengths'] says where samples end, lightning_mimo.sum_by_sample "
            f"sums over each), write takes_packed = True in the class; else leave pack_to out."
        )
    module.check_packing()


def _check_hyperparameters(owner: str, hyperparameters: Mapping[str, Any]) -> None:
    """Refuse now what the first checkpoint would fail with."""
    for key, value in hyperparameters.items():
        if not is_plain(value):
            raise ConfigError(
                f"{owner}.save_hyperparameters() keeps {key!r}, a {type(value).__name__}, but a checkpoint holds only "
                f"numbers, strings, tensors, lists and dictionaries, which can be read without executing code. Write "
                f"save_hyperparameters(ignore=[{key!r}])."
            )


def _accepts(signature: inspect.Signature, arguments: int) -> bool:
    try:
        signature.bind(*range(arguments))
    except TypeError:
        return False
    return True

"""Records every hook of callbacks, modules and datamodules that Lightning calls, in the order of the calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks


def _functions(*owners: type) -> tuple[str, ...]:
    return tuple(
        name
        for owner in owners
        for name, value in vars(owner).items()
        if inspect.isfunction(value) and not name.startswith("_")
    )


TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
"""Of a module or of its datamodule: Lightning calls those of one of them only."""
STEPS = ("training_step", "validation_step", "test_step", "predict_step")
CALLBACK_HOOKS = _functions(pl.Callback)
DATA_HOOKS = (*set(_functions(DataHooks)) - {*TRANSFER_HOOKS}, "state_dict", "load_state_dict", "on_exception")
MODULE_HOOKS = (
    # Lightning calls configure_sharded_model, the old name of configure_model, of modules without the latter only.
    *set(_functions(ModelHooks, CheckpointHooks)) - {"configure_sharded_model"},
    *("prepare_data", "setup", "teardown"),
    *STEPS,
    # Hooks that Lightning has in the LightningModule itself.
    *("configure_callbacks", "configure_optimizers", "backward", "configure_gradient_clipping"),
    *("optimizer_step", "optimizer_zero_grad", "lr_scheduler_step"),
)


class Stateful(pl.Callback):
    """A callback whose state is saved; Lightning gives nothing back to one without."""

    def state_dict(self) -> dict[str, Any]:
        return {"kept": 1}


def recording[Kind: type](base: Kind, names: Iterable[str], *, label: str, calls: list[str]) -> Kind:
    """A subclass whose hooks add ``label.name`` to the calls and then do what they did."""
    return type(base.__name__, (base,), {name: _recorded(base, name, f"{label}.{name}", calls) for name in names})


def _recorded(base: type, name: str, entry: str, calls: list[str]) -> Any:
    original = getattr(base, name)

    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(entry)
        return original(self, *args, **kwargs)

    # Lightning looks for arguments such as batch_idx. Not functools.wraps: it would take the hook for the original.
    hook.__signature__ = inspect.signature(original)
    return hook

"""Leaves out what every process and every Trainer would do again: a quarter of a short training.

The module is imported before ranks and runs are forked, so that they find the answers.
"""

from __future__ import annotations

import functools
import importlib.metadata

import torch
from lightning.fabric.utilities import registry

_GROUPS = ("lightning.pytorch.callbacks_factory", "torch.distributed.backends")
"""Entry points that every Trainer and every first process group look for, in the metadata of all packages."""

_entry_points = functools.cache(importlib.metadata.entry_points)
for each in _GROUPS:
    _entry_points(group=each)


def leave_out() -> None:
    """Look up no entry point twice in this process, and note no seed for devices that are not there."""
    importlib.metadata.entry_points = _entry_points  # type: ignore[assignment]
    registry.entry_points = _entry_points
    # Each time with a formatted stack.
    for module in (torch.cuda.random, torch.xpu.random, torch.mtia):
        module._lazy_call = lambda *args, **kwargs: None

"""Checks the settings of a MimoStrategy before any process group exists, and completes its layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl

from lightning_mimo.layout.batch_plan import micro_batch_sizes
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.optim.ddp import check_options
from lightning_mimo.strategy.module_check import as_mimo_module, check_module_for, check_takes_packed
from lightning_mimo.strategy.trainer_check import check_trainer
from lightning_mimo.strategy.world import backend_for, check_world_size

if TYPE_CHECKING:
    from lightning_mimo.strategy.strategy import MimoStrategy


def check_strategy(strategy: MimoStrategy, trainer: pl.Trainer | None) -> MimoLayout:
    """Check a strategy and return its complete layout; arguments and errors of :meth:`MimoStrategy.validate`."""
    module = None if strategy.lightning_module is None else as_mimo_module(strategy.lightning_module)
    if trainer is not None:
        check_trainer(trainer, module)
    world_size = strategy.num_nodes * strategy.num_processes
    check_world_size(world_size)
    layout = MimoLayout.resolve(strategy.modules, world_size=world_size, colocate=strategy.colocate)
    micro_batch_sizes(layout, global_batch_size=strategy.global_batch_size, num_microbatches=strategy.num_microbatches)
    if module is not None:
        check_module_for(module, layout, strategy.precision_plugin.dtype_policy)
        if strategy.pack_to is not None:
            check_takes_packed(module)
    check_options(strategy.ddp_by_module, strategy.precision_plugin.dtype_policy)
    strategy.nccl.check_backend(backend_for(strategy.root_device, strategy.process_group_backend))
    return layout

"""lightning-mimo: PyTorch Lightning for megatron-core's MimoModel, every module on its own HyperCommGrid.

The package is built in rings; a file imports from its own ring or from one further in, never outwards.

    ring 0  parallelism, placement, layout, routes,    pure Python: what runs where, checked before anything starts
            batching, picture, known_warnings,
            frame_room
    ring 1  infra, process_groups, numerics, bridges,  torch + megatron-core: process groups, the model, the schedule,
            mimo_parallel_utils, pipeline, model,      the optimizer, weights on disk, megatron-core on a CPU
            parts, initialization,
            schedule, mimo_optimizer, optimizer,
            param_groups, lr_schedulers, nonfinite,
            gradient_flow, data_parallel,
            vocab_parallel, generation, random_state,
            packing, sample_check, token_order, cpu,
            footprint, checkpoint/, models/, spans,
            transfers, observe/
    ring 2  cluster, registration, module, data,       Lightning: what users subclass and what the Trainer calls
            precision, launcher, preemption, position,
            trainer_check, model_summary,
            epoch_loop, used_hooks, step_metrics,
            batch_runner, run_checkpoints, run_data,
            world_strategy, running_strategy,
            strategy, step_trace
    ring 3  cli, commands/                             the command line

Public names are loaded when first used, so that ``import lightning_mimo`` costs milliseconds.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mimo.infra import MimoModelInfra
    from lightning_mimo.layout import MimoLayout
    from lightning_mimo.lr_schedulers import PerModuleLR
    from lightning_mimo.mimo_parallel_utils import (
        build_pg_collection_for_schedule,
        finalize_model_grads_multimodule,
        get_module_to_grid_tuple,
        is_current_rank_in_grid,
        multimodule_no_sync,
        unwrap_mimo_model,
        validate_data_loader_contract,
        validate_no_stub_ranks,
        zero_grad_buffer_for_multimodule,
    )
    from lightning_mimo.module import MimoModule
    from lightning_mimo.nonfinite import NonFiniteError
    from lightning_mimo.parallelism import LayoutError, ModuleParallelism
    from lightning_mimo.param_groups import OptimizerOverride
    from lightning_mimo.precision import MimoPrecision
    from lightning_mimo.step_trace import StepTrace
    from lightning_mimo.strategy import MimoStrategy

_HOME = {
    "LayoutError": "parallelism",
    "MimoLayout": "layout",
    "MimoModelInfra": "infra",
    "MimoModule": "module",
    "MimoPrecision": "precision",
    "MimoStrategy": "strategy",
    "ModuleParallelism": "parallelism",
    "NonFiniteError": "nonfinite",
    "OptimizerOverride": "param_groups",
    "PerModuleLR": "lr_schedulers",
    "StepTrace": "step_trace",
    "build_pg_collection_for_schedule": "mimo_parallel_utils",
    "finalize_model_grads_multimodule": "mimo_parallel_utils",
    "get_module_to_grid_tuple": "mimo_parallel_utils",
    "is_current_rank_in_grid": "mimo_parallel_utils",
    "multimodule_no_sync": "mimo_parallel_utils",
    "unwrap_mimo_model": "mimo_parallel_utils",
    "validate_data_loader_contract": "mimo_parallel_utils",
    "validate_no_stub_ranks": "mimo_parallel_utils",
    "zero_grad_buffer_for_multimodule": "mimo_parallel_utils",
}

__all__ = [
    "LayoutError",
    "MimoLayout",
    "MimoModelInfra",
    "MimoModule",
    "MimoPrecision",
    "MimoStrategy",
    "ModuleParallelism",
    "NonFiniteError",
    "OptimizerOverride",
    "PerModuleLR",
    "StepTrace",
    "build_pg_collection_for_schedule",
    "finalize_model_grads_multimodule",
    "get_module_to_grid_tuple",
    "is_current_rank_in_grid",
    "multimodule_no_sync",
    "unwrap_mimo_model",
    "validate_data_loader_contract",
    "validate_no_stub_ranks",
    "zero_grad_buffer_for_multimodule",
]


if "lightning.pytorch.strategies" in sys.modules:
    # Otherwise MimoModule does it: importing Lightning here would cost seconds.
    importlib.import_module("lightning_mimo.registration").register()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lightning_mimo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lightning_mimo.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

"""A training loop around megatron-core's schedule and optimizer with nothing else in it, on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.mimo_parallel_utils import get_module_to_grid_tuple, multimodule_no_sync
from lightning_mimo.optim.param_groups import pass_on
from tests.gpu.measure import StepMeter
from tests.gpu.run import Run


class BareLoop(pl.Callback):
    """Takes the model and the optimizer that the strategy has built, before the Trainer's first step.

    The Trainer is left one step.
    """

    def __init__(self, run: Run, meter: StepMeter) -> None:
        self._run, self._meter = run, meter

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        self._module, self._model = pl_module, pl_module.model
        self._modules = get_module_to_grid_tuple(self._model, strategy.infra)
        self._optimizer = strategy.optimizers[0]
        self._scheduler = trainer.lr_scheduler_configs[0].scheduler
        config = self._model.config
        kept = config.no_sync_func, config.finalize_model_grads_func
        config.no_sync_func = partial(multimodule_no_sync, module_to_grid_tuple=self._modules)
        config.finalize_model_grads_func = self._reduce
        run_schedule = partial(
            get_forward_backward_func(pp_size=1, vp_size=None),
            forward_step_func=self._forward_step,
            model=self._model,
            seq_length=0,
            micro_batch_size=0,
            forward_only=False,
            pg_collection=strategy.infra.pg_collections[LANGUAGE],
        )
        if self._run.accelerator == "gpu":
            torch.cuda.reset_peak_memory_stats()
        batches = iter(trainer.train_dataloader)
        for step in range(self._run.steps):
            self._meter.begin(step)
            batch = strategy.batch_to_device(trainer.precision_plugin.convert_input(next(batches)))
            self._meter.end(self._step(run_schedule, batch))
        self._meter.wait()
        config.no_sync_func, config.finalize_model_grads_func = kept
        trainer.fit_loop.epoch_loop.max_steps = 1

    def _step(self, run_schedule: Any, batch: list[dict[str, Any]]) -> torch.Tensor:
        for module, _ in self._modules:
            module.zero_grad_buffer()
        store = run_schedule(data_iterator=iter(batch), num_microbatches=len(batch))
        loss, tokens = torch.stack([torch.stack(each) for each in store]).sum(dim=0).unbind()
        for module, _ in self._modules:
            module.scale_gradients(tokens.reciprocal())
        mimo = self._optimizer.mimo
        pass_on(self._optimizer.param_groups, mimo.param_groups, mimo.config)
        MimoOptimizer.step(mimo)  # megatron-core's, not what this package makes of it
        mimo.zero_grad()
        self._scheduler.step()
        return loss / tokens

    def _reduce(self, *args: Any, **kwargs: Any) -> None:
        for module, _ in self._modules:
            module.finish_grad_sync()

    def _forward_step(self, iterator: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Any]:
        batch = next(iterator)
        return self._module(batch), partial(self._loss_of, batch)

    def _loss_of(self, batch: dict[str, Any], output: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        loss, tokens, _ = self._module.loss(output, batch)
        return loss, tokens.int(), [loss.detach().double(), tokens.double()]

"""A training loop around megatron-core's schedule with nothing else in it: what MimoStrategy is measured against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch.utils.data import DataLoader

from lightning_mimo.data.loader import shard_dataloader
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.mimo.model import build_mimo_model
from lightning_mimo.mimo_parallel_utils import (
    build_pg_collection_for_schedule,
    gradient_scale,
    multimodule_no_sync,
    scale_gradients,
)
from lightning_mimo.optim.ddp import wrap_with_ddp
from lightning_mimo.optim.param_groups import pass_on
from lightning_mimo.optim.step_reduction import StepReduction
from lightning_mimo.schedule.forward_backward import GlobalBatchSchedule
from lightning_mimo.strategy.module import MimoModule


class BareLoop:
    """Steps a model of its own, beside the one that a Trainer fits: the same start and batches.

    megatron-core's MimoOptimizer tells the ranks of overflows, norms and success one after the other.

    Modules with ranks of their own only. All methods are collective over the world.

    Attributes:
        losses: of every step.
    """

    def __init__(self, trainer: pl.Trainer, module: MimoModule, loader: DataLoader) -> None:
        """To be called in ``on_train_start``.

        Args:
            trainer: fits ``module``; its strategy's grids are used.
            module: says how the model, the optimizer and the loss are made.
            loader: as for one process.
        """
        strategy, self._infra = trainer.strategy, trainer.strategy.infra
        dtype_policy = trainer.precision_plugin.dtype_policy
        self._model = build_mimo_model(
            module.configure_mimo(self._infra), self._infra, seed=strategy.seed, dtype_policy=dtype_policy
        )
        wrap_with_ddp(self._model, self._infra, strategy.ddp_by_module, dtype_policy)
        self._model.train()
        fitted, module.model = module.model, self._model
        made = module.configure_optimizers()
        module.model = fitted
        is_scheduled = isinstance(made, dict)
        self._optimizer = made["optimizer"] if is_scheduled else made
        self._scheduler = made["lr_scheduler"]["scheduler"] if is_scheduled else None
        # For its communicator and for what it does at the end of the backward passes.
        self._schedule = GlobalBatchSchedule(self._model, self._infra, encoder_run_ahead=strategy.encoder_run_ahead)
        self._modules = self._schedule._modules
        self._model.config.no_sync_func = partial(multimodule_no_sync, module_to_grid_tuple=self._modules)
        groups = build_pg_collection_for_schedule(self._infra)
        self._run = partial(
            get_forward_backward_func(schedule_pg_collection=groups),
            forward_step_func=self._forward_step,
            model=self._model,
            seq_length=0,
            micro_batch_size=0,
            forward_only=False,
            pg_collection=groups,
            p2p_communicator=self._schedule._communicator,
        )
        self._loss = module.loss
        # Not by the strategy, which would take it for what the Trainer trains on.
        loader = shard_dataloader(
            loader,
            strategy.plan,
            special_token_ids=self._model.special_token_ids,
            pad_token_id=module.pad_token_id,
            seed=strategy.seed,
        )
        self._batches = _forever(loader)
        self._counts = self._schedule.counts_loss
        self.losses: list[float] = []

    def step(self) -> None:
        """One batch: forward, backward, update."""
        batch = next(self._batches)
        for module, _ in self._modules:
            module.zero_grad_buffer()
        communicator = self._schedule._communicator
        communicator.begin(batch, forward_only=False)
        store = self._run(data_iterator=iter(batch), num_microbatches=len(batch))
        communicator.finish()
        sums = torch.zeros(2, dtype=torch.float64)
        if self._counts:
            sums += torch.stack([torch.stack(each) for each in store]).sum(dim=0)
        self.losses.append(self._update(sums))
        if self._scheduler is not None:
            self._scheduler.step()

    def _update(self, sums: torch.Tensor) -> float:
        """Tell all ranks the loss and its tokens, divide the gradients, and step.

        Args:
            sums: loss and loss tokens of this rank: float64 ``[2]``.

        Returns:
            The loss, summed over its tokens.
        """
        dist.all_reduce(sums)
        self._divide(sums[1])
        self._step()
        return sums[0].item()

    def _divide(self, tokens: torch.Tensor) -> torch.Tensor:
        """Divide the gradients by a number of tokens, float64 scalar; by what they have been multiplied."""
        scale = gradient_scale(tokens)
        scale_gradients(self._infra, self._modules, scale)
        return scale

    def _step(self) -> None:
        mimo = self._optimizer.mimo
        pass_on(self._optimizer.param_groups, mimo.param_groups, mimo.config)
        MimoOptimizer.step(mimo)  # megatron-core's, not what this package makes of it
        mimo.zero_grad()

    def _forward_step(self, iterator: Iterator[Microbatch], model: Any) -> tuple[Any, Any]:
        batch = next(iterator)
        self._schedule._communicator.complete(batch)
        inputs = {name: each for name, each in batch["modality_inputs"].items() if model.role.is_first_stage(name)}
        output, _ = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=None,
            modality_inputs=inputs,
            modality_counts=batch["modality_counts"],
            token_order=batch.get("token_order"),
        )
        return output, partial(self._loss_of, batch)

    def _loss_of(self, batch: Microbatch, output: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        loss, tokens, _ = self._loss(output, batch)
        return loss, tokens.int(), [loss.detach().double(), tokens.double()]


class OneCollectiveLoop(BareLoop):
    """With this package's optimizer: norms travel with the loss, and the host reads once, after the update."""

    def _update(self, sums: torch.Tensor) -> float:
        mimo = self._optimizer.mimo
        loss, tokens = sums
        own = StepReduction(accumulated_loss=loss, accumulated_tokens=tokens, group_squares=mimo.gradient_squares())
        packed = own.pack()
        dist.all_reduce(packed)
        totals = own.unpack(packed)
        scale = self._divide(totals.accumulated_tokens)
        self._optimizer.reduction = replace(totals, group_squares=totals.group_squares * scale.square())
        self._optimizer.step()
        return self._optimizer.outcome.totals.accumulated_loss


class BridgeLoop(BareLoop):
    """Tells the ranks what Megatron-Bridge tells them, one after the other, beside what MimoOptimizer does."""

    def _update(self, sums: torch.Tensor) -> float:
        source = next(filter(self._infra.layout.counts_loss, range(dist.get_world_size())))
        loss, tokens = sums.split(1)
        dist.broadcast(tokens, src=source)
        self._divide(tokens.squeeze(0))
        self._step()
        dist.all_reduce(loss)
        box = [loss.item()]
        dist.broadcast_object_list(box, src=source)
        return box[0]


def _forever(loader: DataLoader) -> Iterator[Any]:
    while True:
        yield from loader

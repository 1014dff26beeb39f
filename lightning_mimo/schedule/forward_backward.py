"""Forward and backward of a global batch with Megatron's pipeline schedules; every rank gets the same loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.utils import get_model_config

from lightning_mimo.comm.pipeline import MimoPipelineCommunicator
from lightning_mimo.errors import DataError
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.mimo.freezing import GradientFlow
from lightning_mimo.mimo.model import RaggedMimoModel
from lightning_mimo.mimo_parallel_utils import (
    build_pg_collection_for_schedule,
    get_module_to_grid_tuple,
    gradient_scale,
    multimodule_no_sync,
    reduce_gradients,
    scale_gradients,
    zero_grad_buffer_for_multimodule,
)
from lightning_mimo.observe.spans import SpanInfo
from lightning_mimo.optim.mimo_optimizer import SingleSyncMimoOptimizer
from lightning_mimo.optim.step_reduction import DeviceReduction, StepReduction
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.schedule.compute_spans import ComputeSpans

Metrics = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Metric name -> (sum, count), scalars of one microbatch; the metric is sum / count over the global batch."""
ForwardStep = Callable[[Microbatch], Any]
LossFunction = Callable[[Any, Microbatch], tuple[torch.Tensor, torch.Tensor, Metrics]]

_SUM = SpanInfo(kind="sum", label="add up losses and norms of all ranks")
_NAMES = SpanInfo(kind="sum", label="receive the names of the metrics")
_NORMS = SpanInfo(kind="optimizer", label="compute the gradient norms")


class GlobalBatchSchedule:
    """Runs global batches through a wrapped model on the grids of an infra.

    Every method that runs a batch is collective over the world.

    Attributes:
        computes_loss: whether this rank is on the last pipeline stage of the language module.
        counts_loss: whether this rank's loss is summed: true for the first tensor-parallel rank of each replica's last
            stage.
    """

    def __init__(
        self,
        model: RaggedMimoModel,
        infra: MimoModelInfra,
        *,
        encoder_run_ahead: int = 0,
        on_first_wait: Callable[[], None] | None = None,
    ) -> None:
        """Collective over the world: builds the bridges between disjoint modules.

        Args:
            model: the model, with its modules wrapped in DDP (or unwrapped, for forward passes only). The schedule sets
                the hooks of its ``config``. Parameters must be frozen before.
            infra: grids and process groups.
            encoder_run_ahead: as for MimoStrategy.
            on_first_wait: as for :class:`lightning_mimo.comm.pipeline.MimoPipelineCommunicator`.
        """
        self._model = model
        self._infra = infra
        self._modules = get_module_to_grid_tuple(model, infra)
        self._computing = ComputeSpans(model, infra)
        self._no_sync = partial(multimodule_no_sync, module_to_grid_tuple=self._modules)
        self._is_accumulating = False
        self._accumulated: tuple[torch.Tensor, torch.Tensor] | None = None  # this rank's loss and its tokens
        self._metric_names: dict[bool, list[str]] = {}
        self._flow = GradientFlow.build(model, infra)
        self._communicator = None
        if not infra.colocated:
            self._communicator = MimoPipelineCommunicator(
                infra,
                model.config,
                needs_gradient=self._flow.leaves,
                encoder_run_ahead=encoder_run_ahead,
                on_first_wait=on_first_wait,
            )
        groups, pass_of_all = self._groups_and_pass()
        self._pass = partial(
            pass_of_all,
            model=model,
            pg_collection=groups,
            p2p_communicator=self._communicator,
            # Both are taken from the tensors, because variable_seq_lengths is set.
            seq_length=0,
            micro_batch_size=0,
        )
        self._frozen_inputs = [name for name in infra.layout.modules if not self._needs_gradient_here(name)]
        model.config.finalize_model_grads_func = self._finalize
        self.computes_loss = infra.layout.is_last_stage(dist.get_rank())
        self.counts_loss = infra.layout.counts_loss(dist.get_rank())

    def zero_grad(self) -> None:
        """Begin a new accumulation: zero all gradient buffers and the accumulated losses."""
        zero_grad_buffer_for_multimodule(self._modules)
        self._accumulated = None

    def train(
        self,
        microbatches: Sequence[Microbatch],
        forward: ForwardStep,
        loss: LossFunction,
        *,
        optimizer: SingleSyncMimoOptimizer | None,
        figures: Callable[[], DeviceReduction] = StepReduction,
    ) -> DeviceReduction:
        """Run forward and backward of all microbatches.

        Args:
            microbatches: this rank's share of the global batch.
            forward: runs the model on one microbatch and returns its output.
            loss: ``(output, microbatch) -> (sum of token losses, number of loss tokens, metrics)``; called only on
                ranks that compute the loss.
            optimizer: the optimizer that steps after this batch, if it is the last batch of its accumulation. Gradients
                are then reduced and divided by the loss tokens of all batches of the accumulation. ``None`` keeps them
                unreduced, because more batches of the same accumulation follow.
            figures: called after all passes; returns this rank's contribution except for loss, metrics and gradient
                norms, which are filled in here.

        Returns:
            Sums over all ranks, as the optimizer's step requires them.
        """
        self._is_accumulating = optimizer is None
        # During accumulation, not even the last microbatch may start a reduction. One context therefore encloses all
        # microbatches, and the schedule gets none, because Megatron's no_sync does not nest.
        self._model.config.no_sync_func = contextlib.nullcontext if self._is_accumulating else self._no_sync
        with self._no_sync() if self._is_accumulating else contextlib.nullcontext():
            results = self._run(microbatches, forward, loss, forward_only=False)
        own = self._accumulate(self._add_losses(figures(), results, training=True))
        if optimizer is None:
            return self._all_reduce(own)
        with self._infra.spans.span(_NORMS):
            squares = optimizer.gradient_squares()
        totals = self._all_reduce(replace(own, group_squares=squares))
        loss_scale = None if optimizer.grad_scaler is None else optimizer.get_loss_scale()
        scale = gradient_scale(totals.accumulated_tokens, loss_scale)
        scale_gradients(self._infra, self._modules, scale)
        return replace(totals, group_squares=totals.group_squares * scale.square())

    @torch.no_grad()
    def evaluate(
        self,
        microbatches: Sequence[Microbatch],
        forward: ForwardStep,
        loss: LossFunction,
        *,
        figures: DeviceReduction | None = None,
    ) -> DeviceReduction:
        """Run forward of all microbatches; arguments and result as for :meth:`train`.

        ``figures`` is this rank's contribution itself, not a function.
        """
        results = self._run(microbatches, forward, loss, forward_only=True)
        return self._all_reduce(self._add_losses(figures or StepReduction(), results, training=False))

    @torch.no_grad()
    def predict(
        self, microbatches: Sequence[Microbatch], forward: ForwardStep, reduce: Callable[[Any, Microbatch], Any]
    ) -> list[Any]:
        """Run forward of all microbatches and ``reduce(output, microbatch)`` on the last language stage.

        Returns:
            One result per microbatch on ranks that compute the loss; empty on other ranks.
        """
        return self._run(
            microbatches,
            forward,
            reduce,
            forward_only=True,
            collect_non_loss_data=True,
        )

    def _run(
        self,
        microbatches: Sequence[Microbatch],
        forward: ForwardStep,
        loss: Callable[[Any, Microbatch], Any],
        *,
        forward_only: bool,
        collect_non_loss_data: bool = False,
    ) -> list[Any]:
        def step(iterator, model):
            microbatch = next(iterator)
            if self._communicator is not None:
                self._communicator.complete(microbatch)
            self._cut_frozen_inputs()
            with self._computing.forward():
                output = forward(microbatch)
            after = self._computing.around_loss(partial(_apply_loss, loss, microbatch))
            return self._computing.output(output), after

        self._computing.begin()
        if self._communicator is not None:
            self._communicator.begin(microbatches, forward_only=forward_only)
        results = self._pass(
            forward_step_func=step,
            data_iterator=iter(microbatches),
            num_microbatches=len(microbatches),
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
        )
        if self._communicator is not None:
            self._communicator.finish()
        return results

    def _groups_and_pass(self) -> tuple[Any, Callable[..., list[Any]]]:
        """Return the process groups in the form that Megatron's schedule requires, and the schedule."""
        if self._communicator is None:
            return self._infra.pg_collections[LANGUAGE], get_forward_backward_func(pp_size=1, vp_size=None)
        groups = build_pg_collection_for_schedule(self._infra)
        return groups, get_forward_backward_func(schedule_pg_collection=groups)

    def _needs_gradient_here(self, name: str) -> bool:
        """Whether the activations that this rank receives from a module need a gradient."""
        sizes = self._infra.layout.modules[name]
        is_own = name in self._infra.participating_modules
        return self._flow.leaves(name, (sizes.coordinates(dist.get_rank())["pp"] if is_own else sizes.pp) - 1)

    def _cut_frozen_inputs(self) -> None:
        """Detach received activations that need no gradient, because the stage that uses them may be frozen as well.

        megatron-core receives all activations with ``requires_grad`` set.
        """
        inputs = getattr(self._model, "input_tensors", None)
        if not isinstance(inputs, dict):
            return
        for name in self._frozen_inputs:
            if name in inputs:
                inputs[name] = inputs[name].detach()

    def _finalize(
        self, model: Any, num_tokens: torch.Tensor, pg_collection: Any = None, force_all_reduce: bool | None = None
    ) -> None:
        """Reduce the gradients; the schedule calls this after all backward passes. :meth:`train` scales them later."""
        if not self._is_accumulating:
            assert all(get_model_config(module).calculate_per_token_loss for module, _ in self._modules)
            reduce_gradients(self._infra, self._modules, force_all_reduce=bool(force_all_reduce))

    def _add_losses(self, figures: DeviceReduction, results: list[Any], *, training: bool) -> DeviceReduction:
        """Fill in this rank's loss, tokens and metrics.

        Args:
            figures: this rank's other contributions.
            results: the third entry of the result of :func:`_apply_loss`, for each microbatch.
            training: whether the metrics are those of training or of evaluation.
        """
        names = self._names_of_metrics(results, training=training)
        sums = figures.loss.new_zeros(2 + 2 * len(names))
        if self.counts_loss:
            for loss, tokens, metrics in results:
                if sorted(metrics) != names:
                    raise DataError(
                        f"loss() returned the metrics {sorted(metrics)}, but {names} before. It must return the same "
                        f"metrics for every microbatch; return a count of 0 for a metric that does not apply."
                    )
                flat = [loss, tokens, *(value for name in names for value in metrics[name])]
                sums += torch.stack([_scalar(value, sums.device) for value in flat])
        loss, tokens, *pairs = sums.split([1, 1, *[2] * len(names)])
        metrics = dict(zip(names, pairs, strict=True))
        return replace(figures, loss=loss.squeeze(0), tokens=tokens.squeeze(0), metrics=metrics)

    def _accumulate(self, own: DeviceReduction) -> DeviceReduction:
        """Fill in loss and tokens of all batches of the accumulation so far."""
        loss, tokens = own.loss, own.tokens
        if self._accumulated is not None:
            loss, tokens = self._accumulated[0] + loss, self._accumulated[1] + tokens
        self._accumulated = loss, tokens
        return replace(own, accumulated_loss=loss, accumulated_tokens=tokens)

    def _all_reduce(self, own: DeviceReduction) -> DeviceReduction:
        """Sum the figures of all ranks, in the only collective of a step over the world."""
        packed = own.pack()
        with self._infra.spans.span(_SUM):
            dist.all_reduce(packed)
        return own.unpack(packed)

    def _names_of_metrics(self, results: list[Any], *, training: bool) -> list[str]:
        """Return the metric names, broadcast once from a rank that computes the loss."""
        if training not in self._metric_names:
            box: list[Any] = [sorted(results[0][2]) if self.computes_loss else None]
            source = next(filter(self._infra.layout.counts_loss, range(dist.get_world_size())))
            with self._infra.spans.span(_NAMES):
                dist.broadcast_object_list(box, src=source)
            self._metric_names[training] = box[0]
        return self._metric_names[training]


def _apply_loss(
    loss: LossFunction, microbatch: Microbatch, output: Any, non_loss_data: bool = False
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor, Metrics]] | Any:
    """Call the loss function in the form of Megatron's per-token loss: (sum, tokens, values to report)."""
    if non_loss_data:
        return loss(output, microbatch)
    total, tokens, metrics = loss(output, microbatch)
    if not isinstance(tokens, torch.Tensor):
        tokens = torch.full((), tokens, device=total.device)  # not a copy, for which the host would wait
    tokens = tokens.detach().to(total.device)
    # The schedule counts tokens as integers; the count in the third entry is the divisor.
    return total, tokens.to(torch.int), (total.detach(), tokens, metrics)


def _scalar(value: torch.Tensor | float, device: torch.device | int) -> torch.Tensor:
    """Convert a value to a detached float64 tensor without dimensions."""
    if not isinstance(value, torch.Tensor):
        return torch.full((), value, dtype=torch.float64, device=device)
    value = value.detach().to(device, torch.float64)
    return value if value.dim() == 0 else value.reshape(())

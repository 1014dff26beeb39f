"""One global batch, forward and backward, through Megatron's pipeline schedules; the same loss on every rank."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    multimodule_no_sync,
    reduce_gradients,
    zero_grad_buffer_for_multimodule,
)
from lightning_mimo.observe.spans import SpanInfo
from lightning_mimo.optim.mimo_optimizer import SingleSyncMimoOptimizer
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.schedule.compute_spans import ComputeSpans

Metrics = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Metric name -> (sum, count), both scalars of one microbatch; the metric is sum / count over the global batch."""
ForwardStep = Callable[[Microbatch], Any]
LossFunction = Callable[[Any, Microbatch], tuple[torch.Tensor, torch.Tensor, Metrics]]

_SUM = SpanInfo(kind="sum", label="add up losses and norms of all ranks")
_NAMES = SpanInfo(kind="sum", label="receive the names of the metrics")
_NORMS = SpanInfo(kind="optimizer", label="take the norms of the gradients")


@dataclass(frozen=True, kw_only=True)
class BatchFigures:
    """:class:`BatchTotals`, read to the host.

    Attributes:
        loss: sum of the token losses / number of loss tokens.
        tokens: number of loss tokens.
        metrics: metric name -> (sum, count).
    """

    loss: float
    tokens: float
    metrics: Mapping[str, tuple[float, float]]

    def means(self) -> dict[str, float]:
        """Metric name -> sum / count; nan where nothing was counted."""
        return {name: total / count if count else math.nan for name, (total, count) in self.metrics.items()}


@dataclass(frozen=True, kw_only=True)
class BatchTotals:
    """What one global batch came to, the same numbers on every rank of the world.

    Attributes:
        sums: float64 ``[2 + 2 * metrics]``, on the device: of token losses, loss tokens, and each metric and its count.
        names: of the metrics.
    """

    sums: torch.Tensor
    names: Sequence[str]

    @property
    def loss(self) -> torch.Tensor:
        """Sum of the token losses / number of loss tokens: float64 scalar, on the device."""
        return self.sums[0] / self.sums[1].clamp(min=1)

    def read(self) -> BatchFigures:
        """All of it, in one read from the device."""
        return self.figures(self.sums.tolist())

    def figures(self, sums: Sequence[float]) -> BatchFigures:
        """The same where the sums have been read to the host."""
        loss, tokens, *rest = sums
        pairs = zip(rest[::2], rest[1::2], strict=True)
        metrics = dict(zip(self.names, pairs, strict=True))
        return BatchFigures(loss=loss / max(tokens, 1.0), tokens=tokens, metrics=metrics)


class GlobalBatchSchedule:
    """Runs global batches through a wrapped model on the grids of an infra.

    Every method that runs a batch is collective over the world.

    Attributes:
        computes_loss: whether this rank is on the last stage of the language module.
        counts_loss: whether this rank's loss counts: the first tensor-parallel rank of each replica's last stage.
    """

    def __init__(self, model: RaggedMimoModel, infra: MimoModelInfra, *, encoder_run_ahead: int = 0) -> None:
        """Collective over the world: builds the bridges between disjoint modules.

        Args:
            model: the model, its modules wrapped in DDP (or bare, for forward passes only). The hooks of its
                ``config`` are set here. What is to be frozen must be so already.
            infra: grids and process groups.
            encoder_run_ahead: as for MimoStrategy.
        """
        self._model = model
        self._infra = infra
        self._modules = get_module_to_grid_tuple(model, infra)
        self._computing = ComputeSpans(model, infra)
        self._no_sync = partial(multimodule_no_sync, module_to_grid_tuple=self._modules)
        self._holding = False
        self._window: torch.Tensor | None = None
        self._metric_names: dict[bool, list[str]] = {}
        self._flow = GradientFlow.build(model, infra)
        self._communicator = None
        if not infra.colocated:
            self._communicator = MimoPipelineCommunicator(
                infra, model.config, needs_gradient=self._flow.leaves, encoder_run_ahead=encoder_run_ahead
            )
        groups, pass_of_all = self._groups_and_pass()
        self._pass = partial(
            pass_of_all,
            model=model,
            pg_collection=groups,
            p2p_communicator=self._communicator,
            # Both are read off the tensors, since variable_seq_lengths is set.
            seq_length=0,
            micro_batch_size=0,
        )
        self._frozen_inputs = [name for name in infra.layout.modules if not self._needs_gradient_here(name)]
        model.config.finalize_model_grads_func = self._finalize
        language = infra.layout.modules[LANGUAGE]
        self._last_stage = range(language.ranks.stop - language.size // language.pp, language.ranks.stop)
        rank = dist.get_rank()
        self.computes_loss = rank in self._last_stage
        self.counts_loss = self.computes_loss and language.coordinates(rank)["tp"] == 0

    def zero_grad(self) -> None:
        """Start a new accumulation window: zero all gradient buffers, and the sums of its batches."""
        zero_grad_buffer_for_multimodule(self._modules)
        self._window = None

    def train(
        self,
        microbatches: Sequence[Microbatch],
        forward: ForwardStep,
        loss: LossFunction,
        *,
        optimizer: SingleSyncMimoOptimizer | None,
        stop: bool = False,
        also: torch.Tensor | None = None,
        on_first_wait: Callable[[], None] | None = None,
    ) -> BatchTotals:
        """Forward and backward of all microbatches.

        Args:
            microbatches: this rank's share of the global batch.
            forward: runs the model on one microbatch and returns its output.
            loss: ``(output, microbatch) -> (sum of token losses, number of loss tokens, metrics)``; called where the
                loss is computed only.
            optimizer: what steps on the gradients once this batch, the last one of its accumulation window, is done.
                They are then reduced and divided by the loss tokens of the whole window, and the optimizer is told
                their norms. ``None`` keeps them unreduced, because more batches of the same window follow.
            stop: whether this rank wants the run to end after the window; the optimizer is told of it on every rank.
            also: float64 ``[n]``, the same n on every rank: added up over all ranks on the way, and handed to the
                optimizer, which reads it with everything else, and this batch's sums after it. Only with an optimizer.
            on_first_wait: what this rank does, once, before it waits for others.
        """
        self._holding = hold = optimizer is None
        config = self._model.config
        # While held, not even the last microbatch may start a reduction, so one context is held open around all of
        # them and the schedule gets none of its own (Megatron's no_sync does not nest).
        config.no_sync_func = contextlib.nullcontext if hold else self._no_sync
        with self._no_sync() if hold else contextlib.nullcontext():
            store = self._run(microbatches, forward, loss, forward_only=False, on_first_wait=on_first_wait)
        # The one collective of a step over all ranks brings what was lost and learned from together.
        own = [] if hold else self._found_by_this_rank(optimizer, stop, also)
        totals, found = self._total(store, training=True, and_also=own)
        loss_and_tokens = totals.sums[:2]
        self._window = loss_and_tokens if self._window is None else self._window + loss_and_tokens
        if not hold:
            self._scale_and_tell(optimizer, found, totals)
        return totals

    def _scale_and_tell(
        self, optimizer: SingleSyncMimoOptimizer, found: Sequence[torch.Tensor], totals: BatchTotals
    ) -> None:
        """Divide the gradients by the loss tokens of the window, and tell the optimizer what all ranks came to."""
        loss, tokens = self._window.split(1)
        scale = tokens.clamp(min=1.0).reciprocal()
        if optimizer.grad_scaler is not None:
            scale = scale / optimizer.get_loss_scale().double()
        # A scalar without dimensions takes on the gradients' dtype; none of theirs is lost.
        without_dimensions = scale.squeeze(0)
        for module, _ in self._modules:
            module.scale_gradients(without_dimensions)
        stops, squares, *also = found
        optimizer.receive(squares=squares * scale.square(), loss=loss, stops=stops, also=[*also, totals.sums])

    def _found_by_this_rank(
        self, optimizer: SingleSyncMimoOptimizer, stop: bool, also: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """What is added up over all ranks beside the loss: whether to stop, squared norms, and what else there is."""
        with self._infra.spans.span(_NORMS):
            squares = optimizer.gradient_squares()
        stops = squares.new_full((1,), float(stop))
        return [stops, squares] if also is None else [stops, squares, also.to(squares.device)]

    @torch.no_grad()
    def evaluate(
        self, microbatches: Sequence[Microbatch], forward: ForwardStep, loss: LossFunction, *, stop: bool = False
    ) -> tuple[BatchTotals, bool]:
        """Forward of all microbatches; arguments as for :meth:`train`.

        Returns:
            The totals, and whether any rank wants the run to end.
        """
        store = self._run(microbatches, forward, loss, forward_only=True)
        stops = torch.full((1,), float(stop), dtype=torch.float64, device=torch.cuda.current_device())
        totals, (stops,) = self._total(store, training=False, and_also=[stops])
        return totals, bool(stops)

    @torch.no_grad()
    def predict(
        self, microbatches: Sequence[Microbatch], forward: ForwardStep, reduce: Callable[[Any, Microbatch], Any]
    ) -> list[Any]:
        """Forward of all microbatches, then ``reduce(output, microbatch)`` on the last language stage.

        Returns:
            One result per microbatch where the loss is computed, nothing on other ranks.
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
        on_first_wait: Callable[[], None] | None = None,
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
            self._communicator.begin(microbatches, forward_only=forward_only, on_first_wait=on_first_wait)
        store = self._pass(
            forward_step_func=step,
            data_iterator=iter(microbatches),
            num_microbatches=len(microbatches),
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
        )
        if self._communicator is not None:
            self._communicator.finish()
        return store

    def _groups_and_pass(self) -> tuple[Any, Callable[..., list[Any]]]:
        """Process groups in the form that a schedule of Megatron's takes, and the schedule."""
        if self._communicator is None:
            return self._infra.pg_collections[LANGUAGE], get_forward_backward_func(pp_size=1, vp_size=None)
        groups = build_pg_collection_for_schedule(self._infra)
        return groups, get_forward_backward_func(schedule_pg_collection=groups)

    def _needs_gradient_here(self, name: str) -> bool:
        """Whether what this rank receives of a module needs a gradient."""
        sizes = self._infra.layout.modules[name]
        is_own = name in self._infra.participating_modules
        return self._flow.leaves(name, (sizes.coordinates(dist.get_rank())["pp"] if is_own else sizes.pp) - 1)

    def _cut_frozen_inputs(self) -> None:
        """Begin no graph at an activation that needs no gradient: the stage behind it may be frozen as well.

        megatron-core receives all of them as if they needed one.
        """
        inputs = getattr(self._model, "input_tensors", None)
        for name in self._frozen_inputs if isinstance(inputs, dict) else ():
            if name in inputs:
                inputs[name] = inputs[name].detach()

    def _finalize(
        self, model: Any, num_tokens: torch.Tensor, pg_collection: Any = None, force_all_reduce: bool | None = None
    ) -> None:
        """What the schedule calls when all backward passes are done. The division by tokens comes after it."""
        if not self._holding:
            assert all(get_model_config(module).calculate_per_token_loss for module, _ in self._modules)
            reduce_gradients(self._infra, self._modules, force_all_reduce=bool(force_all_reduce))

    def _total(
        self, store: list[Any], *, training: bool, and_also: Sequence[torch.Tensor]
    ) -> tuple[BatchTotals, Sequence[torch.Tensor]]:
        """Add up what the language ranks counted and tell every rank, in one small all-reduce.

        Args:
            store: what :func:`_apply_loss` returned for each microbatch.
            training: which metrics there are.
            and_also: float64, one dimension each; added up over all ranks on the same occasion, and returned.
        """
        names = self._names_of_metrics(store, training=training)
        device = torch.cuda.current_device()
        sums = torch.zeros(2 + 2 * len(names), dtype=torch.float64, device=device)
        if self.counts_loss:
            for loss, tokens, metrics in store:
                if sorted(metrics) != names:
                    raise DataError(
                        f"loss() returned the metrics {sorted(metrics)}, but {names} before. Every microbatch must "
                        f"return the same metrics; a metric that does not apply has a count of 0."
                    )
                flat = [loss, tokens, *(value for name in names for value in metrics[name])]
                sums += torch.stack([_scalar(value, device) for value in flat])
        together = torch.cat([sums, *and_also])
        with self._infra.spans.span(_SUM):
            dist.all_reduce(together)
        sums, *rest = together.split([len(sums), *map(len, and_also)])
        return BatchTotals(sums=sums, names=names), rest

    def _names_of_metrics(self, store: list[Any], *, training: bool) -> list[str]:
        """Metric names; known where the loss is computed, told to the other ranks once."""
        if training not in self._metric_names:
            box = [sorted(store[0][2]) if self.computes_loss else None]
            with self._infra.spans.span(_NAMES):
                dist.broadcast_object_list(box, src=self._last_stage.start)
            self._metric_names[training] = box[0]
        return self._metric_names[training]


def _apply_loss(
    loss: LossFunction, microbatch: Microbatch, output: Any, non_loss_data: bool = False
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor, Metrics]] | Any:
    """Call the loss in the form of Megatron's per-token loss: (sum, tokens, what to report)."""
    if non_loss_data:
        return loss(output, microbatch)
    total, tokens, metrics = loss(output, microbatch)
    tokens = torch.as_tensor(tokens, device=total.device).detach()
    return total, tokens.to(torch.int), (total.detach(), tokens, metrics)


def _scalar(value: torch.Tensor | float, device: torch.device | int) -> torch.Tensor:
    """float64, without dimensions and without a graph."""
    if not isinstance(value, torch.Tensor):
        value = torch.tensor(value, dtype=torch.float64)
    value = value.detach().to(device, torch.float64)
    return value if value.dim() == 0 else value.reshape(())

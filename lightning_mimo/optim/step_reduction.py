"""Figures of a step that are summed over all ranks in a single all-reduce and read by the host once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any

import torch

from lightning_mimo.mimo_parallel_utils import loss_divisor


def _zero() -> Any:
    return torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())


def _nothing() -> Any:
    return torch.zeros(0, dtype=torch.float64, device=torch.cuda.current_device())


@dataclass(frozen=True, kw_only=True)
class StepReduction[Scalar: (torch.Tensor, float), Vector: (torch.Tensor, list[float])]:
    """Figures of a global batch and of its optimizer step.

    On the device, all fields are float64 tensors. Before the all-reduce they hold this rank's contribution, and after
    it the sums, which are the same on every rank. Shapes are the same on every rank. :meth:`read` converts the fields
    to Python numbers.

    A new metric of the loss needs no change here: ``MimoModule.loss`` returns it. Any other new figure needs a field
    here, whose default contributes nothing, and code in ``lightning_mimo/strategy``:
    ``BatchRunner._figures_of_this_rank`` sets it and ``BatchMetrics.show_step`` shows it.

    Attributes:
        loss: scalar, sum of the token losses of the batch.
        tokens: scalar, loss tokens of the batch.
        metrics: metric name -> ``[2]``, its sum and its count over the batch.
        positions: ``[2]``, positions that the language module has computed in the batch, padding included; and how many
            of these are tokens of samples that count. Empty in an evaluation.
        accumulated_loss: scalar, ``loss`` of all batches since the last optimizer step.
        accumulated_tokens: scalar, ``tokens`` of the same batches.
        stops: scalar, number of ranks that request the end of the run.
        group_squares: ``[parameter groups]``, squared gradient norms; empty if no optimizer step follows.
        samples: ``[n]``, see :meth:`lightning_mimo.data.sample_check.SampleChecksums.figures`; empty if no optimizer
            step follows.
        next_samples: ``[n]``, the same for the next batch, as far as it has been loaded.
        telemetry: ``[n]``, see :meth:`lightning_mimo.observe.telemetry.Telemetry.figures`; empty in most steps.
    """

    loss: Scalar = field(default_factory=_zero)
    tokens: Scalar = field(default_factory=_zero)
    metrics: Mapping[str, Vector] = field(default_factory=dict)
    positions: Vector = field(default_factory=_nothing)
    accumulated_loss: Scalar = field(default_factory=_zero)
    accumulated_tokens: Scalar = field(default_factory=_zero)
    stops: Scalar = field(default_factory=_zero)
    group_squares: Vector = field(default_factory=_nothing)
    samples: Vector = field(default_factory=_nothing)
    next_samples: Vector = field(default_factory=_nothing)
    telemetry: Vector = field(default_factory=_nothing)

    def pack(self) -> torch.Tensor:
        """Concatenate all fields to one float64 tensor with one dimension."""
        return torch.cat([tensor.reshape(-1) for tensor in self._tensors()])

    def unpack(self, packed: torch.Tensor) -> DeviceReduction:
        """Split a packed tensor into fields with the shapes of this instance.

        Args:
            packed: the tensor from :meth:`pack`, or its sum over all ranks.
        """
        pieces = iter(packed.split([tensor.numel() for tensor in self._tensors()]))
        return self._filled(lambda like: next(pieces).view(like.shape))

    def read(self) -> HostReduction:
        """Convert the fields to Python numbers with a single read from the device."""
        numbers = iter(self.pack().tolist())
        return self._filled(lambda like: list(islice(numbers, len(like))) if like.ndim else next(numbers))

    @property
    def mean_loss(self) -> Scalar:
        """Sum of the token losses of the batch / number of its loss tokens."""
        return self.loss / loss_divisor(self.tokens)

    @property
    def metric_means(self) -> dict[str, Scalar]:
        """Metric name -> sum / count; NaN if the count is 0."""
        pairs: Mapping[str, Any] = self.metrics
        return {name: _mean(total, count) for name, (total, count) in pairs.items()}

    def _tensors(self) -> Iterator[torch.Tensor]:
        for each in fields(self):
            value = getattr(self, each.name)
            yield from value.values() if isinstance(value, Mapping) else (value,)

    def _filled(self, value_for: Callable[[torch.Tensor], Any]) -> StepReduction:
        values = {}
        for each in fields(self):
            own = getattr(self, each.name)
            is_mapping = isinstance(own, Mapping)
            values[each.name] = {name: value_for(own[name]) for name in own} if is_mapping else value_for(own)
        return StepReduction(**values)


type DeviceReduction = StepReduction[torch.Tensor, torch.Tensor]
type HostReduction = StepReduction[float, list[float]]


def _mean[Number: (torch.Tensor, float)](total: Number, count: Number) -> Number:
    if isinstance(count, torch.Tensor):
        return total / count  # 0 / 0 is NaN, without a synchronization with the device
    return total / count if count else math.nan

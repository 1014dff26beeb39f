"""The figures of a step that all ranks add up in one all-reduce, and that the host reads once."""

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
    """What a global batch, and the optimizer step on it, come to.

    On the device all fields are float64 tensors: first what this rank adds, after the all-reduce the sums, the same on
    every rank. Shapes are the same on every rank, too. :meth:`read` gives the same as Python numbers.

    A metric of the loss needs no change here: ``MimoModule.loss`` returns it. Any other figure touches two places: a
    field here, whose default adds nothing, and ``lightning_mimo/strategy/batch_runner.py``, where
    ``BatchRunner._figures_of_this_rank`` fills it in and ``BatchRunner._show`` logs it.

    Attributes:
        loss: scalar, sum of the token losses of the batch.
        tokens: scalar, loss tokens of the batch.
        metrics: metric name -> ``[2]``, its sum and its count over the batch.
        accumulated_loss: scalar, ``loss`` of all batches since the last optimizer step.
        accumulated_tokens: scalar, ``tokens`` of the same.
        stops: scalar, how many ranks want the run to end.
        group_squares: ``[parameter groups]``, squared gradient norms; empty where no optimizer step follows.
        telemetry: ``[n]``, see :meth:`lightning_mimo.observe.telemetry.Telemetry.figures`; empty in most steps.
    """

    loss: Scalar = field(default_factory=_zero)
    tokens: Scalar = field(default_factory=_zero)
    metrics: Mapping[str, Vector] = field(default_factory=dict)
    accumulated_loss: Scalar = field(default_factory=_zero)
    accumulated_tokens: Scalar = field(default_factory=_zero)
    stops: Scalar = field(default_factory=_zero)
    group_squares: Vector = field(default_factory=_nothing)
    telemetry: Vector = field(default_factory=_nothing)

    def pack(self) -> torch.Tensor:
        """All fields in one float64 tensor of one dimension."""
        return torch.cat([tensor.reshape(-1) for tensor in self._tensors()])

    def unpack(self, packed: torch.Tensor) -> DeviceReduction:
        """Fields with the shapes of these and other values.

        Args:
            packed: what :meth:`pack` returned, or the sum of that over all ranks.
        """
        pieces = iter(packed.split([tensor.numel() for tensor in self._tensors()]))
        return self._filled(lambda like: next(pieces).view(like.shape))

    def read(self) -> HostReduction:
        """The same as Python numbers, in one read from the device."""
        numbers = iter(self.pack().tolist())
        return self._filled(lambda like: list(islice(numbers, len(like))) if like.ndim else next(numbers))

    @property
    def mean_loss(self) -> Scalar:
        """Sum of the token losses of the batch / number of its loss tokens."""
        return self.loss / loss_divisor(self.tokens)

    @property
    def metric_means(self) -> dict[str, Scalar]:
        """Metric name -> sum / count; NaN where nothing was counted."""
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
        return total / count  # 0 / 0 is NaN, and nobody waits for the device
    return total / count if count else math.nan

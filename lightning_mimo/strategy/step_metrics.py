"""What the strategy finds out in every step, put where Lightning's loggers, callbacks and progress bar look for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, override

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection


class StepMetrics(_ResultCollection):
    """What is logged in training: by the user's hooks as in Lightning, and by the strategy, anew in every batch.

    To ``log`` one number takes Lightning longer than all that is left of a step, and at its end it goes through all of
    them once more, each with a read of its own from the device. The strategy has its numbers on the host already, and
    makes tensors of them where somebody looks.
    """

    def __init__(self) -> None:
        super().__init__(training=True)
        self._values: Mapping[str, torch.Tensor | float] = {}  # of the last batch
        self._last: dict[str, torch.Tensor | float] = {}  # of every name, for callbacks
        self._in_bar: dict[str, float] = {}

    def show(self, values: Mapping[str, float], *, prog_bar: Collection[str]) -> None:
        """What ``log(name, value, on_step=True, on_epoch=False)`` would do for each.

        Loggers and the progress bar get these only; callbacks keep the last number of every name.

        Args:
            values: names of metrics and numbers, the same on every rank.
            prog_bar: names of those that the progress bar shows.
        """
        self._values = values
        self._last.update(values)
        self._in_bar = {name: values[name] for name in prog_bar}

    def show_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The same of numbers that are still on the device, but for the progress bar, which would have to read them.

        Args:
            tensors: names of metrics and float32 scalars, the same on every rank.
        """
        self._values = tensors
        self._last.update(tensors)

    @override
    def metrics(self, on_step: bool) -> Any:
        metrics = super().metrics(on_step)
        if on_step:
            own = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in self._last.items()}
            # What a hook has logged under the same name came later.
            metrics["callback"] = own | metrics["callback"]
            metrics["log"] = {name: own[name] for name in self._values} | metrics["log"]
            metrics["pbar"] = self._in_bar | metrics["pbar"]
        return metrics

    @override
    def reset(self, metrics: bool | None = None, fx: str | None = None) -> None:
        super().reset(metrics, fx)
        if fx is None:
            self._values, self._last, self._in_bar = {}, {}, {}

    def __bool__(self) -> bool:
        # Also where only the strategy has logged: the Trainer does not look into an empty collection.
        return True


def collect_step_metrics(trainer: pl.Trainer) -> StepMetrics:
    """Have a Trainer take what is logged in training from a collection that the strategy fills, too."""
    trainer.fit_loop.epoch_loop._results = collection = StepMetrics()
    return collection

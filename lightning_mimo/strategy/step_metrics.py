"""What the strategy finds out in every step, put where Lightning's loggers, callbacks and progress bar look for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import lightning.pytorch as pl
import torch


class StepMetrics:
    """Shows metrics of a step as Lightning's own LearningRateMonitor does: without ``log``.

    ``log`` makes a tensor on the device of every number and reads it back for the progress bar, one after the other.
    The strategy has its numbers on the host already. What a user logs under one of these names comes later and wins.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        """
        Args:
            trainer: the one that trains.
        """
        self._trainer = trainer

    def show(self, values: Mapping[str, float], *, prog_bar: Collection[str]) -> None:
        """Show the metrics of an optimizer step: to loggers (every ``log_every_n_steps``), callbacks and the bar.

        Args:
            values: names of metrics and numbers, the same on every rank.
            prog_bar: names of those that the progress bar shows.
        """
        trainer, connector = self._trainer, self._trainer._logger_connector
        metrics = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
        trainer.callback_metrics.update(metrics)
        trainer.logged_metrics.update(metrics)
        trainer.progress_bar_metrics.update({name: values[name] for name in prog_bar})
        if connector.should_update_logs:
            connector.log_metrics(metrics)

    def show_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Show metrics that are still on the device: to callbacks only, since all others would have to read them.

        Args:
            tensors: names of metrics and float32 scalars, the same on every rank.
        """
        self._trainer.callback_metrics.update(tensors)

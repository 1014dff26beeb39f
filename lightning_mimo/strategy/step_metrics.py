"""Passes the metrics of every step to Lightning's loggers, callbacks and progress bar."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import lightning.pytorch as pl
import torch


class StepMetrics:
    """Shows metrics of a step without ``log``, as Lightning's LearningRateMonitor does.

    ``log`` copies every number to the device and reads it back for the progress bar, one after the other. The strategy
    already has its numbers on the host. If a user logs under one of these names, the user's value overwrites this one.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        """
        Args:
            trainer: the Trainer that runs the training.
        """
        self._trainer = trainer

    def show(self, values: Mapping[str, float], *, prog_bar: Collection[str]) -> None:
        """Pass the metrics of an optimizer step to loggers (every ``log_every_n_steps``), callbacks and progress bar.

        Args:
            values: metric name -> number, the same on every rank.
            prog_bar: names of the metrics that the progress bar shows.
        """
        trainer, connector = self._trainer, self._trainer._logger_connector
        metrics = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
        trainer.callback_metrics.update(metrics)
        trainer.logged_metrics.update(metrics)
        trainer.progress_bar_metrics.update({name: values[name] for name in prog_bar})
        if connector.should_update_logs:
            connector.log_metrics(metrics)

    def show_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Pass metrics that are still on the device to callbacks only, because loggers would have to read them.

        Args:
            tensors: metric name -> float32 scalar, the same on every rank.
        """
        self._trainer.callback_metrics.update(tensors)

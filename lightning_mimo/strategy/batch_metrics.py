"""Names the metrics of a batch, and shows or logs them."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from lightning_mimo.optim.mimo_optimizer import StepOutcome
from lightning_mimo.optim.step_reduction import DeviceReduction, HostReduction
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.step_metrics import StepMetrics


class BatchMetrics:
    """Turns sums over a global batch into metrics: ``train/loss``, ``train/tokens_per_sec``, ``val/loss`` and so on."""

    def __init__(self, module: MimoModule, shown: StepMetrics | None) -> None:
        """
        Args:
            module: logs what a validation or a test measures.
            shown: receives the metrics of training; ``None`` to show none.
        """
        self._module = module
        self._shown = shown
        self._batch_ended = 0.0

    def show_step(self, outcome: StepOutcome, *, skipped_steps: int, telemetry: Mapping[str, float]) -> None:
        """Show the metrics of the last batch of an accumulation window and of its optimizer step.

        Args:
            outcome: outcome of the step.
            skipped_steps: number of steps skipped so far.
            telemetry: metrics of the modules.
        """
        if self._shown is None:
            return
        totals = outcome.totals
        in_bar = {"train/loss": totals.mean_loss}
        if seconds := self._seconds_of_batch():
            in_bar["train/tokens_per_sec"] = totals.tokens / seconds
        in_bar |= {f"train/{name}": mean for name, mean in totals.metric_means.items()}
        of_step = {"train/skipped_steps": float(skipped_steps)}
        computed, used = totals.positions
        if used:
            of_step["train/padding"] = computed / used
        if outcome.updated:
            of_step["train/grad_norm"] = outcome.grad_norm
            of_step |= {f"train/grad_norm/{name}": norm for name, norm in outcome.module_norms.items()}
        self._shown.show({**in_bar, **of_step, **telemetry}, prog_bar=in_bar)

    def show_accumulating(self, totals: DeviceReduction) -> None:
        """Show callbacks the metrics of an earlier batch of an accumulation window, as tensors, without a host wait."""
        if self._shown is None:
            return
        values = {"train/loss": totals.mean_loss}
        if seconds := self._seconds_of_batch():
            values["train/tokens_per_sec"] = totals.tokens / seconds
        values |= {f"train/{name}": mean for name, mean in totals.metric_means.items()}
        self._shown.show_tensors({name: value.float() for name, value in values.items()})

    def log_evaluation(self, stage: str, totals: DeviceReduction, figures: HostReduction) -> None:
        """Log loss and metrics, weighted by their counts, so that an epoch's mean is the mean over all its tokens.

        Args:
            stage: "val" or "test".
            totals: sums over the global batch on the device, whose means are logged: Lightning would copy numbers of
                the host to the device one after the other, and wait for each.
            figures: the same on the host, for the weights.
        """
        how = {"prog_bar": True, "on_step": False, "on_epoch": True}
        dtype = torch.get_default_dtype()
        self._module.log(f"{stage}/loss", totals.mean_loss.to(dtype), batch_size=_weight(figures.tokens), **how)
        means = totals.metric_means
        for name, (_, count) in figures.metrics.items():
            if count:
                self._module.log(f"{stage}/{name}", means[name].to(dtype), batch_size=_weight(count), **how)

    def restart_clock(self) -> None:
        """Measure no time until the next training batch ends: a validation is no part of it."""
        self._batch_ended = 0.0

    def _seconds_of_batch(self) -> float | None:
        """Seconds since the end of the previous batch; ``None`` if that was not a training batch."""
        before, self._batch_ended = self._batch_ended, time.perf_counter()
        return self._batch_ended - before if before else None


def _weight(count: float) -> int | float:
    """Convert a count to a weight for Lightning, which adds up integers without rounding."""
    return int(count) if count.is_integer() else count

"""Runs one of Lightning's batches: checked, through the schedule, logged, and reported where it fails."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_mimo.checkpoint.saving import Generators, generators
from lightning_mimo.data.sample_check import check_samples
from lightning_mimo.errors import ConfigError, DataError, NonFiniteError
from lightning_mimo.launch.preemption import Signals
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.observe.spans import LOADING, Span, SpanInfo
from lightning_mimo.observe.telemetry import Telemetry
from lightning_mimo.optim.mimo_optimizer import StepOutcome
from lightning_mimo.optim.optimizer import MimoTorchOptimizer
from lightning_mimo.optim.step_reduction import DeviceReduction, HostReduction, StepReduction
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.schedule.forward_backward import GlobalBatchSchedule
from lightning_mimo.schedule.generation import gather_indices, greedy_decode
from lightning_mimo.schedule.nonfinite import describe, find_nonfinite
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.step_metrics import StepMetrics

Batch = list[Microbatch]
"""This rank's microbatches of a global batch, as its DataLoader yields them."""
Step = Callable[[Microbatch, int], Any]
"""One of the user's steps: ``(microbatch, batch_idx)`` -> the model's output."""

StepListener = Callable[[list[Span]], None]
"""Is given what this rank recorded of an optimizer step."""


_LOAD = SpanInfo(kind=LOADING, label="loading of the next batch")


class BatchRunner:
    """Runs global batches of one ``fit``, ``validate``, ``test`` or ``predict``. All methods are collective.

    Attributes:
        is_accumulating: whether more batches are accumulated before the optimizer steps, after the next one.
        must_stop: whether the run is to end after the batch that was the last one; the same on every rank.
        listeners: are given the spans of every step when it is done.
    """

    def __init__(
        self,
        module: MimoModule,
        infra: MimoModelInfra,
        *,
        global_batch_size: int,
        encoder_run_ahead: int,
        device: torch.device,
        check_samples: str,
        on_nonfinite: str,
        signals: Signals,
        telemetry: bool,
        load_ahead: Callable[[], None],
        metrics: StepMetrics | None,
    ) -> None:
        """Collective over the world: builds the bridges.

        Args:
            module: the user's module, its model ready to run.
            infra: grids and process groups.
            global_batch_size: samples of a batch over all ranks.
            encoder_run_ahead: as for MimoStrategy.
            device: of this rank.
            check_samples: as for MimoStrategy.
            on_nonfinite: as for MimoStrategy.
            signals: what this rank was told.
            telemetry: whether to find out what each module does.
            load_ahead: loads the next batch to train on; called once a batch, where this rank would wait for others.
            metrics: where what a step came to is shown; ``None`` for nowhere.
        """
        self.is_accumulating = False
        self.must_stop = False
        self.listeners: list[StepListener] = []
        self._telemetry = Telemetry(infra.layout, infra.spans, device) if telemetry else None
        self._step_ended = 0.0
        self._signals = signals
        self._load_ahead = load_ahead
        self._may_load_ahead = False
        self._metrics = metrics
        self._module = module
        self._infra = infra
        self._global_batch_size = global_batch_size
        self._device = device
        self._check = check_samples
        self._on_nonfinite = on_nonfinite
        self._schedule = GlobalBatchSchedule(
            module.mimo_model, infra, encoder_run_ahead=encoder_run_ahead, on_first_wait=self._load_next
        )
        self._generators: Generators | None = None  # as they were before the accumulation; None between two
        self._last: tuple[Batch, int] | None = None
        self._losses: list[tuple[int, torch.Tensor]] = []  # of the batches of the accumulation
        self._step_started = 0.0

    def train(self, batch: Batch, batch_idx: int, optimizer: MimoTorchOptimizer) -> torch.Tensor:
        """Forward and backward.

        Returns:
            The loss of the global batch, float32 scalar, the same on every rank.
        """
        if not isinstance(batch, list):
            raise ConfigError(
                f"train_dataloader() returned several DataLoaders, so a batch is a {type(batch).__name__} of batches. "
                f"MimoStrategy trains on one: concatenate the datasets (torch.utils.data.ConcatDataset)."
            )
        self._check_samples(batch, batch_idx)
        if self._generators is None:
            self._schedule.zero_grad()
            # To go back to if a checkpoint is saved during the accumulation, which takes more than one batch.
            self._generators = generators() if self.is_accumulating else {}
        optimizer.outcome = None
        self._infra.spans.keep = self._telemetry is not None or bool(self.listeners)
        self._step_ended = self._step_ended or time.perf_counter()
        self._may_load_ahead = self._another_follows(batch_idx)
        with self._module.microbatches():
            totals = self._schedule.train(
                batch,
                self._training_step(batch_idx),
                self._module.loss,
                optimizer=None if self.is_accumulating else optimizer.mimo,
                figures=self._figures_of_this_rank(batch),
            )
        loss = totals.mean_loss
        self._losses.append((batch_idx, loss))
        self._last = batch, batch_idx
        if self.is_accumulating:
            self._show_accumulating(totals)
        else:
            optimizer.reduction = totals
        return loss.float()

    def end_accumulation(self, optimizer: MimoTorchOptimizer) -> None:
        """The optimizer has stepped: the next batch begins a new accumulation.

        Args:
            optimizer: says what came of it.

        Raises:
            DataError: if ``MimoModule.loss`` counted what is no number of tokens.
            NonFiniteError: if the step was skipped because of something that is not finite, unless the loss scale was
                merely too large or such steps are to be left out.
        """
        self._generators = None
        outcome = optimizer.outcome
        assert outcome is not None and self._last is not None, "the optimizer has stepped on the last batch"
        self.must_stop = outcome.stop
        (batch, batch_idx), self._last = self._last, None
        self._show(outcome, optimizer.skipped_steps, self._end_step(outcome.totals.telemetry))
        losses, self._losses = self._losses, []
        where = f"in step {self._module.global_step}"
        if not 0 <= (tokens := outcome.totals.accumulated_tokens) < math.inf:
            raise DataError(
                f"The loss tokens that loss() returned add up to {tokens:g} {where} (batch {batch_idx}), and the loss "
                f"cannot be divided by that; the weights were not updated. Return a number that is not negative."
            )
        if outcome.updated or outcome.overflow:
            return
        if self._on_nonfinite == "skip":
            rank_zero_warn(f"{outcome.problem} {where}: the weights were not updated.", category=RuntimeWarning)
            return
        raise NonFiniteError(
            f"{outcome.problem} {where} (batch {batch_idx}); the weights were not updated. "
            f"{self._find_nonfinite(batch, batch_idx, losses)} "
            f"MimoStrategy(checks=Checks(on_nonfinite='skip')) skips such steps and goes on."
        )

    def _find_nonfinite(self, batch: Batch, batch_idx: int, losses: Sequence[tuple[int, torch.Tensor]]) -> str:
        """Where something that is not finite came from, in words. Runs the last batch again.

        Args:
            batch: the last one of the accumulation.
            batch_idx: its number.
            losses: number and loss of all batches of the accumulation.
        """
        if earlier := [index for index, loss in losses[:-1] if not loss.isfinite()]:
            return f"The first that is not finite: the loss of batch {earlier[0]}, in the same accumulation window."
        module = self._module
        with module.microbatches():
            step = self._training_step(batch_idx)
            return describe(find_nonfinite(self._schedule, module.mimo_model, self._infra, batch, step, module.loss))

    def _another_follows(self, batch_idx: int) -> bool:
        """Whether the epoch has another batch that is trained on, as far as can be known."""
        trainer = self._module.trainer
        is_last_step = not self.is_accumulating and trainer.global_step + 1 == trainer.max_steps
        return batch_idx + 1 < trainer.num_training_batches and not is_last_step

    def _load_next(self) -> None:
        if self._may_load_ahead:
            self._may_load_ahead = False
            with self._infra.spans.span(_LOAD):
                self._load_ahead()

    def _figures_of_this_rank(self, batch: Batch) -> DeviceReduction:
        """What the other ranks are to learn of this one with the step."""
        figures = self._stops()
        if self._telemetry is None:
            return figures
        self._telemetry.count(batch)
        trainer: Any = self._module.trainer
        # By this count alone, not by trainer.should_stop, which may come to the ranks one after the other.
        steps, every = trainer.fit_loop.epoch_loop._batches_that_stepped + 1, trainer.log_every_n_steps
        if self.is_accumulating or not every or steps % every:
            return figures
        return replace(figures, telemetry=self._telemetry.figures().to(self._device))

    def _stops(self) -> DeviceReduction:
        """Whether this rank was told to stop."""
        is_told = self._signals.received is not None
        return StepReduction(stops=torch.full((), float(is_told), dtype=torch.float64, device=self._device))

    def _end_step(self, telemetry: Sequence[float]) -> dict[str, float]:
        """Tell the listeners what was done in the step; what is to be logged of the modules.

        Args:
            telemetry: what all ranks together have; empty in steps that do not log it.
        """
        spans, now = self._infra.spans.drain(), time.perf_counter()
        described = {}
        if self._telemetry is not None:
            described = self._telemetry.describe(telemetry) if telemetry else {}
            self._telemetry.add(spans, now - self._step_ended)
        self._step_ended = now
        for listener in tuple(self.listeners):
            listener(spans)
        return described

    def _show(self, outcome: StepOutcome, skipped_steps: int, telemetry: Mapping[str, float]) -> None:
        """Loggers, callbacks and the progress bar get what the last batch of an accumulation and its step came to.

        Args:
            outcome: of the step.
            skipped_steps: how many steps have been skipped so far.
            telemetry: what is logged of the modules.
        """
        if self._metrics is None:
            return
        totals = outcome.totals
        in_bar = {"train/loss": totals.mean_loss}
        if seconds := self._seconds_of_batch():
            in_bar["train/tokens_per_sec"] = totals.tokens / seconds
        in_bar |= {f"train/{name}": mean for name, mean in totals.metric_means.items()}
        of_step = {"train/skipped_steps": float(skipped_steps)}
        if outcome.updated:
            of_step["train/grad_norm"] = outcome.grad_norm
            of_step |= {f"train/grad_norm/{name}": norm for name, norm in outcome.module_norms.items()}
        self._metrics.show({**in_bar, **of_step, **telemetry}, prog_bar=in_bar)

    def _show_accumulating(self, totals: DeviceReduction) -> None:
        """Callbacks get what an earlier batch of an accumulation came to, as tensors that nobody has to wait for."""
        if self._metrics is None:
            return
        values = {"train/loss": totals.mean_loss}
        if seconds := self._seconds_of_batch():
            values["train/tokens_per_sec"] = totals.tokens / seconds
        values |= {f"train/{name}": mean for name, mean in totals.metric_means.items()}
        self._metrics.show_tensors({name: value.float() for name, value in values.items()})

    def _seconds_of_batch(self) -> float | None:
        """Since the end of the batch before, if it was one of training."""
        before, self._step_started = self._step_started, time.perf_counter()
        return self._step_started - before if before else None

    @property
    def accumulation(self) -> tuple[int, Generators | None]:
        """How many batches no optimizer step has learned from yet, and the generators before the first of them."""
        return (0, None) if self._generators is None else (len(self._losses), self._generators)

    def evaluate(
        self, stage: str, step: Callable[..., Any], batch: Batch, batch_idx: int, *dataloader_idx: int
    ) -> torch.Tensor:
        """Forward only; logs under ``stage/``, weighted by tokens.

        Args:
            stage: "val" or "test".
            step: one of the user's steps.
            batch: a global batch.
            batch_idx: its number.
            dataloader_idx: which DataLoader it comes from, where there are several.

        Returns:
            The loss of the global batch, float32 scalar, the same on every rank.
        """
        self._check_samples(batch, batch_idx)
        self._step_started = self._step_ended = 0.0  # or the next training step would be charged with the validation
        self._infra.spans.keep = False
        with self._module.microbatches():
            totals = self._schedule.evaluate(
                batch,
                lambda microbatch: step(microbatch, batch_idx, *dataloader_idx),
                self._module.loss,
                figures=self._stops(),
            )
        figures = totals.read()
        self.must_stop = figures.stops > 0
        self._log(stage, figures)
        return totals.mean_loss.float()

    def predict(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Greedy answers: ``[{"sample_index": int, "tokens": [int, …]}, …]`` of the global batch, on every rank."""
        self._check_samples(batch, batch_idx)
        tokens = self.generate(batch, max_new_tokens=self._module.max_new_tokens)
        indices = gather_indices(batch, global_batch_size=self._global_batch_size, device=self._device)
        self.must_stop = _on_any_rank(self._signals.received is not None, device=self._device)
        return [
            {"sample_index": index, "tokens": row}
            for index, row in zip(indices, tokens.tolist(), strict=True)
            if index >= 0
        ]

    def generate(self, batch: Batch, *, max_new_tokens: int) -> torch.Tensor:
        """Write tokens for every sample: int64 ``[global_batch_size, max_new_tokens]``, by position in the batch."""
        module = self._module
        groups = self._infra.pg_collections.get(LANGUAGE)
        with module.microbatches():
            return greedy_decode(
                self._schedule,
                batch,
                lambda microbatch: module.predict_step(microbatch, 0),
                global_batch_size=self._global_batch_size,
                max_new_tokens=max_new_tokens,
                pad_token_id=module.pad_token_id,
                placeholders=module.mimo_model.special_token_ids,
                group=groups.tp if groups else None,
            )

    def _training_step(self, batch_idx: int) -> Callable[[Microbatch], Any]:
        return lambda microbatch: self._module.training_step(microbatch, batch_idx)

    def _check_samples(self, batch: Batch, batch_idx: int) -> None:
        if self._check == "always" or (self._check == "first" and batch_idx == 0):
            check_samples(batch, self._infra.layout, global_batch_size=self._global_batch_size, device=self._device)

    def _log(self, stage: str, figures: HostReduction) -> None:
        """Log loss and metrics, weighted by what they count, so that an epoch's mean is that over all its tokens."""
        how = {"prog_bar": True, "on_step": False, "on_epoch": True}
        self._module.log(f"{stage}/loss", figures.mean_loss, batch_size=_weight(figures.tokens), **how)
        means = figures.metric_means
        for name, (_, count) in figures.metrics.items():
            if count:
                self._module.log(f"{stage}/{name}", means[name], batch_size=_weight(count), **how)


def _weight(count: float) -> int | float:
    """A count as Lightning weights by it: whole numbers are added up without rounding."""
    return int(count) if count.is_integer() else count


def _on_any_rank(here: bool, *, device: torch.device) -> bool:
    """Collective over the world."""
    anywhere = torch.tensor(int(here), device=device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    return bool(anywhere)

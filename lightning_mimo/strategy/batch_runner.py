"""Runs one of Lightning's batches: checks its samples, runs the schedule, logs metrics, and reports failures."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_mimo.checkpoint.saving import Generators, generators
from lightning_mimo.data.sample_check import SampleChecksums, check_samples
from lightning_mimo.errors import ConfigError, DataError, NonFiniteError
from lightning_mimo.launch.preemption import Signals
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.mimo.freezing import TrainedParameters
from lightning_mimo.observe.spans import LOADING, Span, SpanInfo
from lightning_mimo.observe.telemetry import Telemetry
from lightning_mimo.optim.optimizer import MimoTorchOptimizer
from lightning_mimo.optim.step_reduction import DeviceReduction, StepReduction
from lightning_mimo.parallel.host_copies import to_device
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.schedule.forward_backward import GlobalBatchSchedule
from lightning_mimo.schedule.generation import gather_indices, greedy_decode
from lightning_mimo.schedule.nonfinite import describe, find_nonfinite
from lightning_mimo.strategy.batch_metrics import BatchMetrics
from lightning_mimo.strategy.device_peak import device_peak
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.step_check import check_batch, checked_loss, checked_step

Batch = list[Microbatch]
"""This rank's microbatches of a global batch, as its DataLoader yields them."""
Step = Callable[[Microbatch, int], Any]
"""One of the user's steps: ``(microbatch, batch_idx)`` -> the model's output."""

StepListener = Callable[[list[Span]], None]
"""Receives the spans that this rank recorded in an optimizer step."""


_LOAD = SpanInfo(kind=LOADING, label="loading of the next batch")


class BatchRunner:
    """Runs global batches of one ``fit``, ``validate``, ``test`` or ``predict``. All methods are collective.

    Attributes:
        must_stop: whether the run must end after the batch that just ran; the same on every rank.
        listeners: called with the spans of every optimizer step when it is complete.
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
        load_ahead: Callable[[], Batch | None],
        metrics: BatchMetrics,
    ) -> None:
        """Collective over the world: builds the bridges.

        Args:
            module: the user's module, with its model ready to run.
            infra: grids and process groups.
            global_batch_size: samples per global batch, over all ranks.
            encoder_run_ahead: microbatches that an encoder computes before 1F1B requests them.
            device: device of this rank.
            check_samples: when to compare the samples of all ranks, a value of ``Checks.samples``.
            on_nonfinite: reaction to an infinite or NaN loss or gradient, a value of ``Checks.on_nonfinite``.
            signals: the signals that this rank received.
            telemetry: whether to measure what each module does.
            load_ahead: loads the next training batch and returns it, or ``None`` if there is none; called once per
                batch, while this rank waits for others.
            metrics: shows the metrics of each batch.
        """
        self.must_stop = False
        self.listeners: list[StepListener] = []
        self._is_accumulating = False
        self._telemetry = None
        if telemetry:
            peak = device_peak(device, module.mimo_model.config.pipeline_dtype)
            self._telemetry = Telemetry(infra.layout, infra.spans, device, peak_flops=peak)
        self._step_ended = 0.0
        self._signals = signals
        self._load_ahead = load_ahead
        self._may_load_ahead = False
        self._ahead: Batch | None = None
        self._next_differs = False
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
        self._loss = checked_loss(module.loss, type(module).__name__)
        self._trained = TrainedParameters(module.mimo_model, infra)
        self._generators: Generators | None = None  # state before the accumulation window; None between windows
        self._last: tuple[Batch, int] | None = None
        self._samples = self._checksums()  # of the batches in the accumulation window
        self._losses: list[tuple[int, torch.Tensor]] = []  # of the batches in the accumulation window

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Context of a batch that the optimizer does not step after, so that gradients are not reduced."""
        self._is_accumulating = True
        try:
            yield
        finally:
            self._is_accumulating = False

    def train(self, batch: Batch, batch_idx: int, optimizer: MimoTorchOptimizer) -> torch.Tensor:
        """Run the forward and backward passes of one global batch.

        Returns:
            The loss of the global batch, float32 scalar, the same on every rank.
        """
        check_batch(batch, stage="train")
        self._trained.check()
        self._check_samples(batch, batch_idx)
        if optimizer.reduction is not None:  # the module's own optimizer_step() has left out the step
            optimizer.discard_gradients()
            self._generators, self._losses = None, []
        if self._generators is None:
            self._schedule.zero_grad()
            # Saved in a checkpoint that is written between two batches of an accumulation window.
            self._generators = generators() if self._is_accumulating else {}
        optimizer.outcome = None
        self._infra.spans.keep = self._telemetry is not None or bool(self.listeners)
        self._step_ended = self._step_ended or time.perf_counter()
        self._may_load_ahead, self._ahead = self._another_follows(batch_idx), None
        counting = contextlib.nullcontext() if self._telemetry is None else self._telemetry.counting_flops()
        with self._module.microbatches(), counting:
            totals = self._schedule.train(
                batch,
                self._training_step(batch_idx),
                self._loss,
                optimizer=None if self._is_accumulating else optimizer.mimo,
                figures=lambda: self._figures_of_this_rank(batch),
            )
        loss = totals.mean_loss
        self._losses.append((batch_idx, loss))
        self._last = batch, batch_idx
        if self._is_accumulating:
            self._metrics.show_accumulating(totals)
        else:
            optimizer.reduction = totals
        return loss.float()

    def end_accumulation(self, optimizer: MimoTorchOptimizer) -> None:
        """End an accumulation window after the optimizer step: check and log its outcome.

        Args:
            optimizer: the optimizer that stepped; holds the outcome of the step.

        Raises:
            DataError: if ranks held different samples, or the token counts of ``MimoModule.loss`` have an invalid sum.
            NonFiniteError: if the step was skipped because of an infinite or NaN value; except if the cause was too
                large a loss scale, or ``on_nonfinite="skip"``.
        """
        self._generators = None
        outcome = optimizer.outcome
        assert outcome is not None and self._last is not None, "the optimizer has stepped on the last batch"
        self.must_stop = outcome.stop
        samples, self._samples = self._samples, self._checksums()
        self._next_differs = samples.differ(outcome.totals.next_samples)
        try:
            samples.check(outcome.totals.samples)
        except DataError as error:
            raise DataError(
                f"{error} The weights were already updated with these samples: resume from the last checkpoint. "
                f"MimoStrategy(checks=Checks(samples='always')) compares samples before each batch."
            ) from None
        (batch, batch_idx), self._last = self._last, None
        telemetry = self._end_step(outcome.totals.telemetry)
        self._metrics.show_step(outcome, skipped_steps=optimizer.skipped_steps, telemetry=telemetry)
        losses, self._losses = self._losses, []
        where = f"in step {self._module.global_step}"
        if not 0 <= (tokens := outcome.totals.accumulated_tokens) < math.inf:
            raise DataError(
                f"The loss tokens that loss() returned add up to {tokens:g} {where} (batch {batch_idx}), and the loss "
                f"cannot be divided by that; the weights were not updated. Return a finite count of 0 or more."
            )
        if outcome.updated or outcome.overflow:
            return
        if self._on_nonfinite == "skip":
            rank_zero_warn(f"{outcome.problem} {where}: the weights were not updated.", category=RuntimeWarning)
            return
        raise NonFiniteError(
            f"{outcome.problem} {where} (batch {batch_idx}); the weights were not updated. "
            f"{self._find_nonfinite(batch, batch_idx, losses)} "
            f"MimoStrategy(checks=Checks(on_nonfinite='skip')) skips such steps and continues."
        )

    def _find_nonfinite(self, batch: Batch, batch_idx: int, losses: Sequence[tuple[int, torch.Tensor]]) -> str:
        """Describe where an infinite or NaN value first appeared. Runs the last batch again.

        Args:
            batch: last batch of the accumulation window.
            batch_idx: index of this batch.
            losses: index and loss of every batch in the accumulation window.
        """
        if earlier := [index for index, loss in losses[:-1] if not loss.isfinite()]:
            return (
                f"The first tensor that is not finite: the loss of batch {earlier[0]}, in the same accumulation window."
            )
        module = self._module
        with module.microbatches():
            step = self._training_step(batch_idx)
            return describe(find_nonfinite(self._schedule, module.mimo_model, self._infra, batch, step, self._loss))

    def _another_follows(self, batch_idx: int) -> bool:
        """Whether the epoch has another training batch, as far as this is known in advance."""
        trainer = self._module.trainer
        is_last_step = not self._is_accumulating and trainer.global_step + 1 == trainer.max_steps
        return batch_idx + 1 < trainer.num_training_batches and not is_last_step

    def _load_next(self) -> None:
        if self._may_load_ahead:
            self._may_load_ahead = False
            with self._infra.spans.span(_LOAD):
                self._ahead = self._load_ahead()

    def _figures_of_this_rank(self, batch: Batch) -> DeviceReduction:
        """Figures of this rank that are reduced over all ranks together with the step."""
        figures = replace(self._stops(), positions=self._positions(batch))
        self._samples.add(batch)
        if not self._is_accumulating:
            self._load_next()
            following = self._checksums()
            following.add(self._ahead or [])
            figures = replace(figures, samples=self._samples.figures(), next_samples=following.figures())
        if self._telemetry is None:
            return figures
        self._telemetry.count(batch)
        trainer: Any = self._module.trainer
        # By this count alone, not by trainer.should_stop, which may change on different ranks at different times.
        steps, every = trainer.fit_loop.epoch_loop._batches_that_stepped + 1, trainer.log_every_n_steps
        if self._is_accumulating or not every or steps % every:
            return figures
        return replace(figures, telemetry=to_device(self._telemetry.figures(), self._device))

    def _positions(self, batch: Batch) -> torch.Tensor:
        """``[2]``: positions that this rank's language replica computes, and those that samples use; counted once."""
        counts = [0, 0]
        if self._schedule.counts_loss:
            for each in batch:
                counts[0] += self._module.mimo_model.positions_computed(each["input_ids"])
                lengths = zip(each["sample_lengths"], each["is_padding"], strict=True)
                counts[1] += sum(length for length, is_padding in lengths if not is_padding)
        return to_device(torch.tensor(counts, dtype=torch.float64, device="cpu"), self._device)

    def _stops(self) -> DeviceReduction:
        """A reduction in which ``stops`` is 1 if this rank received a signal to stop."""
        is_told = self._signals.received is not None
        return StepReduction(stops=torch.full((), float(is_told), dtype=torch.float64, device=self._device))

    def _end_step(self, telemetry: Sequence[float]) -> dict[str, float]:
        """Pass the spans of the step to the listeners, and return the module metrics to log.

        Args:
            telemetry: figures reduced over all ranks; empty in steps that do not log them.
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

    @property
    def accumulation(self) -> tuple[int, Generators | None]:
        """Number of batches that no optimizer step has used yet, and the generators before the first of them."""
        return (0, None) if self._generators is None else (len(self._losses), self._generators)

    def evaluate(
        self, stage: str, step: Callable[..., Any], batch: Batch, batch_idx: int, *dataloader_idx: int
    ) -> torch.Tensor:
        """Run the forward pass of one global batch and log under ``stage/``, weighted by tokens.

        Args:
            stage: "val" or "test".
            step: the user's ``validation_step`` or ``test_step``.
            batch: this rank's microbatches of a global batch.
            batch_idx: index of the batch.
            dataloader_idx: index of its DataLoader, if there are several.

        Returns:
            The loss of the global batch, float32 scalar, the same on every rank.
        """
        check_batch(batch, stage=stage)
        self._check_samples(batch, batch_idx)
        samples = self._checksums()
        step = checked_step(step, type(self._module).__name__)
        samples.add(batch)
        self._step_ended = 0.0  # the next training step must not include the validation
        self._metrics.restart_clock()
        self._infra.spans.keep = False
        with self._module.microbatches():
            totals = self._schedule.evaluate(
                batch,
                lambda microbatch: step(microbatch, batch_idx, *dataloader_idx),
                self._loss,
                figures=replace(self._stops(), samples=samples.figures()),
            )
        figures = totals.read()
        samples.check(figures.samples)
        self.must_stop = figures.stops > 0
        self._metrics.log_evaluation(stage, totals, figures)
        return totals.mean_loss.float()

    def predict(self, batch: Batch, batch_idx: int, *dataloader_idx: int) -> list[dict[str, Any]]:
        """Decode greedily: ``[{"sample_index": int, "tokens": [int, …]}, …]`` of the global batch, on every rank."""
        check_batch(batch, stage="predict")
        self._check_samples(batch, batch_idx)
        indices_of_step = (batch_idx, *dataloader_idx)
        tokens = self.generate(batch, max_new_tokens=self._module.max_new_tokens, indices_of_step=indices_of_step)
        indices = gather_indices(batch, global_batch_size=self._global_batch_size, device=self._device)
        self.must_stop = _on_any_rank(self._signals.received is not None, device=self._device)
        return [
            {"sample_index": index, "tokens": row}
            for index, row in zip(indices, tokens.tolist(), strict=True)
            if index >= 0
        ]

    def generate(self, batch: Batch, *, max_new_tokens: int, indices_of_step: tuple[int, ...] = (0,)) -> torch.Tensor:
        """Generate tokens for every sample: int64 ``[global_batch_size, max_new_tokens]``, by position in the batch."""
        module = self._module
        if any(microbatch["is_packed"] for microbatch in batch):
            raise ConfigError(
                "generate() was given a packed batch (MimoStrategy(pack_to=...)), but tokens are generated sample by "
                "sample. Give it a batch of a predict DataLoader, which is never packed, or use Trainer.predict."
            )
        step = checked_step(module.predict_step, type(module).__name__)
        groups = self._infra.pg_collections.get(LANGUAGE)
        with module.microbatches():
            return greedy_decode(
                self._schedule,
                batch,
                lambda microbatch: step(microbatch, *indices_of_step),
                global_batch_size=self._global_batch_size,
                max_new_tokens=max_new_tokens,
                pad_token_id=module.pad_token_id,
                placeholders=module.mimo_model.special_token_ids,
                group=groups.tp if groups else None,
            )

    def _training_step(self, batch_idx: int) -> Callable[[Microbatch], Any]:
        step = checked_step(self._module.training_step, type(self._module).__name__)
        return lambda microbatch: step(microbatch, batch_idx)

    def _check_samples(self, batch: Batch, batch_idx: int) -> None:
        is_due = self._check == "always" or (self._check == "first" and batch_idx == 0)
        if is_due or self._next_differs:
            check_samples(batch, self._infra.layout, global_batch_size=self._global_batch_size, device=self._device)

    def _checksums(self) -> SampleChecksums:
        return SampleChecksums(
            self._infra.layout,
            global_batch_size=self._global_batch_size,
            device=self._device,
            enabled=self._check != "never",
        )


def _on_any_rank(here: bool, *, device: torch.device) -> bool:
    """Whether a flag is set on any rank. Collective over the world."""
    anywhere = torch.tensor(int(here), device=device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    return bool(anywhere)

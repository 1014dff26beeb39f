"""What becomes of one of Lightning's batches: through the schedule, checked, logged, and reported where it fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_mimo.checkpoint.saving import Generators, generators
from lightning_mimo.data.sample_check import check_samples
from lightning_mimo.errors import ConfigError, NonFiniteError
from lightning_mimo.launch.preemption import Signals
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.observe.spans import LOADING, Span, SpanInfo
from lightning_mimo.observe.telemetry import Telemetry
from lightning_mimo.optim.mimo_optimizer import StepOutcome
from lightning_mimo.optim.optimizer import MimoTorchOptimizer
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.schedule.forward_backward import BatchFigures, BatchTotals, GlobalBatchSchedule
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
        hold: whether more batches of the same accumulation window follow the next one.
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
            load_ahead: loads the next batch to train on.
            metrics: where what a step came to is shown; ``None`` for nowhere.
        """
        self.hold = False
        self.must_stop = False
        self.listeners: list[StepListener] = []
        self._telemetry = Telemetry(infra.layout, infra.spans, device) if telemetry else None
        self._step_ended = 0.0
        self._signals = signals
        self._load_ahead = load_ahead
        self._metrics = metrics
        self._module = module
        self._infra = infra
        self._global_batch_size = global_batch_size
        self._device = device
        self._check = check_samples
        self._on_nonfinite = on_nonfinite
        self._schedule = GlobalBatchSchedule(module.model, infra, encoder_run_ahead=encoder_run_ahead)
        self._window: Generators | None = None
        self._last: tuple[Batch, int, BatchTotals] | None = None
        self._losses: list[tuple[int, torch.Tensor]] = []  # of the window's batches
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
        if self._window is None:
            self._schedule.zero_grad()
            # To go back to if a checkpoint is saved inside of the window, which takes more than one batch.
            self._window = generators() if self.hold else {}
        optimizer.outcome = None
        self._infra.spans.keep = self._telemetry is not None or bool(self.listeners)
        self._step_ended = self._step_ended or time.perf_counter()
        with self._module.microbatches():
            totals = self._schedule.train(
                batch,
                self._training_step(batch_idx),
                self._module.loss,
                optimizer=None if self.hold else optimizer.mimo,
                stop=self._signals.received is not None,
                also=self._figures_to_share(batch),
                on_first_wait=self._load_next if self._another_follows(batch_idx) else None,
            )
        loss = totals.loss
        self._losses.append((batch_idx, loss))
        self._last = batch, batch_idx, totals
        if self.hold:
            self._show_held(totals)
        return loss.float()

    def close_window(self, optimizer: MimoTorchOptimizer) -> None:
        """The optimizer has stepped: the next batch begins a new accumulation window.

        Args:
            optimizer: says what came of it.

        Raises:
            NonFiniteError: if the step was skipped because of something that is not finite, unless the loss scale was
                merely too large or such steps are to be left out.
        """
        self._window = None
        outcome = optimizer.outcome
        self.must_stop = outcome.stop
        (batch, batch_idx, totals), self._last = self._last, None
        shared = len(outcome.also) - len(totals.sums)  # the batch's sums come last
        of_modules = self._account_for_step(outcome.also[:shared])
        of_step = _figures_of(outcome, optimizer.skipped_steps)
        self._show(totals.figures(outcome.also[shared:]), of_step | of_modules)
        losses, self._losses = self._losses, []
        if outcome.updated or outcome.overflow:
            return
        where = f"in step {self._module.global_step}"
        if self._on_nonfinite == "skip":
            rank_zero_warn(f"{outcome.problem} {where}: the weights were not updated.", category=RuntimeWarning)
            return
        step, model = self._training_step(batch_idx), self._module.model
        earlier = [index for index, loss in losses[:-1] if not loss.isfinite()]
        if earlier:
            reason = f"The first that is not finite: the loss of batch {earlier[0]}, in the same accumulation window."
        else:
            with self._module.microbatches():
                found = find_nonfinite(self._schedule, model, self._infra, batch, step, self._module.loss)
            reason = describe(found)
        raise NonFiniteError(
            f"{outcome.problem} {where} (batch {batch_idx}); the weights were not updated. {reason} "
            f"MimoStrategy(checks=Checks(on_nonfinite='skip')) skips such steps and goes on."
        )

    def _another_follows(self, batch_idx: int) -> bool:
        """Whether the epoch has another batch that is trained on, as far as can be known."""
        trainer = self._module.trainer
        is_last_step = not self.hold and trainer.global_step + 1 == trainer.max_steps
        return batch_idx + 1 < trainer.num_training_batches and not is_last_step

    def _load_next(self) -> None:
        with self._infra.spans.span(_LOAD):
            self._load_ahead()

    def _figures_to_share(self, batch: Batch) -> torch.Tensor | None:
        """What the other ranks are to learn of this one with the step, if it is one of those that are logged."""
        if self._telemetry is None:
            return None
        self._telemetry.count(batch)
        trainer = self._module.trainer
        # By this count alone, not by trainer.should_stop, which may come to the ranks one after the other.
        steps, every = trainer.fit_loop.epoch_loop._batches_that_stepped + 1, trainer.log_every_n_steps
        return None if self.hold or not every or steps % every else self._telemetry.figures()

    def _account_for_step(self, shared: Sequence[float]) -> dict[str, float]:
        """Tell the listeners what was done in it; what is to be logged of the modules, from what ranks have shared."""
        spans, now = self._infra.spans.drain(), time.perf_counter()
        described = {}
        if self._telemetry is not None:
            described = self._telemetry.describe(shared) if shared else {}
            self._telemetry.add(spans, now - self._step_ended)
        self._step_ended = now
        for listener in tuple(self.listeners):
            listener(spans)
        return described

    def _show(self, figures: BatchFigures, of_step: Mapping[str, float]) -> None:
        """Loggers, callbacks and the progress bar get what the last batch of a window and its step came to."""
        if self._metrics is None:
            return
        in_bar = {"train/loss": figures.loss}
        if seconds := self._seconds_of_batch():
            in_bar["train/tokens_per_sec"] = figures.tokens / seconds
        in_bar |= {f"train/{name}": mean for name, mean in figures.means().items()}
        self._metrics.show({**in_bar, **of_step}, prog_bar=in_bar)

    def _show_held(self, totals: BatchTotals) -> None:
        """Callbacks get what an earlier batch of a window came to, as tensors that nobody has to wait for."""
        if self._metrics is None:
            return
        values = {"train/loss": totals.loss}
        if seconds := self._seconds_of_batch():
            values["train/tokens_per_sec"] = totals.sums[1] / seconds
        means = totals.sums[2::2] / totals.sums[3::2]
        values |= {f"train/{name}": mean for name, mean in zip(totals.names, means, strict=True)}
        self._metrics.show_tensors({name: value.float() for name, value in values.items()})

    def _seconds_of_batch(self) -> float | None:
        """Since the end of the batch before, if it was one of training."""
        before, self._step_started = self._step_started, time.perf_counter()
        return self._step_started - before if before else None

    @property
    def open_window(self) -> tuple[int, Generators | None]:
        """How many batches of an accumulation window are held, and what the generators were before the first one."""
        return (0, None) if self._window is None else (len(self._losses), self._window)

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
            totals, self.must_stop = self._schedule.evaluate(
                batch,
                lambda microbatch: step(microbatch, batch_idx, *dataloader_idx),
                self._module.loss,
                stop=self._signals.received is not None,
            )
        self._log(stage, totals.read())
        return totals.loss.float()

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
                placeholders=module.model.special_token_ids,
                group=groups.tp if groups else None,
            )

    def _training_step(self, batch_idx: int) -> Callable[[Microbatch], Any]:
        return lambda microbatch: self._module.training_step(microbatch, batch_idx)

    def _check_samples(self, batch: Batch, batch_idx: int) -> None:
        if self._check == "always" or (self._check == "first" and batch_idx == 0):
            check_samples(batch, self._infra.layout, global_batch_size=self._global_batch_size, device=self._device)

    def _log(self, stage: str, figures: BatchFigures) -> None:
        """Log loss and metrics, weighted by what they count, so that an epoch's mean is that over all its tokens."""
        how = {"prog_bar": True, "on_step": False, "on_epoch": True}
        self._module.log(f"{stage}/loss", figures.loss, batch_size=int(figures.tokens), **how)
        for name, mean in figures.means().items():
            if counted := int(figures.metrics[name][1]):
                self._module.log(f"{stage}/{name}", mean, batch_size=counted, **how)


def _figures_of(outcome: StepOutcome, skipped_steps: int) -> dict[str, float]:
    """What is logged of an optimizer step."""
    figures = {"train/skipped_steps": float(skipped_steps)}
    if outcome.updated:
        figures["train/grad_norm"] = outcome.grad_norm
        figures |= {f"train/grad_norm/{name}": norm for name, norm in outcome.module_norms.items()}
    return figures


def _on_any_rank(here: bool, *, device: torch.device) -> bool:
    """Collective over the world."""
    anywhere = torch.tensor(int(here), device=device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    return bool(anywhere)

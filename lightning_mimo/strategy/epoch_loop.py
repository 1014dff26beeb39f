"""Lightning's loop over the batches of an epoch, without what costs time in every batch and serves nobody."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any, override

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from lightning_mimo.data.shared_memory import SharedMemoryBatch
from lightning_mimo.strategy.frame_room import with_room_for_frames
from lightning_mimo.strategy.no_profiler import NoProfiler
from lightning_mimo.strategy.used_hooks import UsedHooks

_LEFT_TO_LIGHTNING = (
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "on_train_batch_start",  # may end the epoch
    "optimizer_step",
    "optimizer_zero_grad",
)


class TrainingEpochLoop(_TrainingEpochLoop):
    """Does not ask rank 0 for a SIGTERM: that a rank has been told to end travels with the step's collective.

    A batch goes by a short way, which calls the hooks that somebody has and keeps the counts of Lightning's; by
    Lightning's own way if the module overrides one of the hooks that it is built around, or a profiler looks on.
    """

    def __init__(self, trainer: pl.Trainer, min_steps: int | None, max_steps: int, *, hooks: UsedHooks) -> None:
        """
        Args:
            trainer: as for Lightning's.
            min_steps: as for Lightning's.
            max_steps: as for Lightning's.
            hooks: of the trainer.
        """
        super().__init__(trainer, min_steps, max_steps)
        self._hooks = hooks
        self._validates: bool | None = None

    @override
    def run(self, data_fetcher: _DataFetcher) -> None:
        try:
            with_room_for_frames(super().run, data_fetcher)
        finally:
            self._keep_metrics()
            self._validates = None

    @override
    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        self._validates = super()._should_check_val_epoch()

    @override
    def advance(self, data_fetcher: _DataFetcher) -> None:
        if not self._is_short(data_fetcher):
            super().advance(data_fetcher)
            return
        trainer, progress, connector = self.trainer, self.batch_progress, self.trainer._logger_connector
        if self.val_loop.restarting:  # only a validation that was broken off goes on where it was
            self.val_loop.restarting = False
        batch, _, _ = next(data_fetcher)
        batch_idx = self.batch_idx + 1
        progress.is_last_batch = data_fetcher.done
        if isinstance(batch, SharedMemoryBatch):  # several DataLoaders are refused further on
            batch = trainer.precision_plugin.convert_input(batch).to(trainer.strategy.root_device)
        progress.increment_ready()
        connector.on_batch_start(batch)
        self._hooks.call("on_train_batch_start", batch, batch_idx)
        progress.increment_started()
        loss = self._run_batch(batch, batch_idx)
        progress.increment_processed()
        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        if self._num_ready_batches_reached():
            self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        self._hooks.call("on_train_batch_end", {"loss": loss}, batch, batch_idx)
        self._results.batch = self._results.batch_size = None
        progress.increment_completed()
        connector.update_train_step_metrics()

    @override
    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        if self._should_check_val_fx(data_fetcher):
            self._keep_metrics()
        super().on_advance_end(data_fetcher)

    def _keep_metrics(self) -> None:
        """Have the Trainer keep what was logged last, for those that look when this loop is not the one that runs.

        While it is, the Trainer looks into what this loop has logged, and need not be given it after every batch.
        """
        connector = self.trainer._logger_connector
        if isinstance(connector._first_loop_iter, bool):  # a batch has been run
            connector.on_batch_end()

    def _is_short(self, data_fetcher: _DataFetcher) -> bool:
        return (
            not self.restarting
            and type(self.trainer.profiler) is NoProfiler
            and not isinstance(data_fetcher, _DataLoaderIterDataFetcher)
            and not any(map(self._hooks.module_has, _LEFT_TO_LIGHTNING))
        )

    def _run_batch(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Forward, backward and, if it is the last of a window, the optimizer's step; the loss as Lightning has it."""
        strategy, counts = self.trainer.strategy, self.automatic_optimization.optim_progress.optimizer
        closure = partial(self._closure, batch, batch_idx)
        if self._should_accumulate():
            with strategy.block_backward_sync():
                return closure()
        counts.step.increment_ready()
        loss = strategy.optimizer_step(strategy.optimizers[0], closure)
        counts.step.increment_completed()
        return loss

    def _closure(self, batch: Any, batch_idx: int) -> torch.Tensor:
        batches = self.trainer.accumulate_grad_batches
        loss = self.trainer.strategy.training_step(batch, batch_idx)
        if batch_idx % batches == 0:
            counts = self.automatic_optimization.optim_progress.optimizer.zero_grad
            counts.increment_ready()
            self._hooks.call("on_before_zero_grad", self.trainer.strategy.optimizers[0])
            counts.increment_started()
            counts.increment_completed()  # the schedule has zeroed the gradients, before its backward passes
        return loss / batches if batches > 1 else loss

    @override
    def _broadcast_sigterm_tensor(self) -> None:
        """Nothing."""

    @override
    def _build_kwargs(self, kwargs: OrderedDict[str, Any], batch: Any, batch_idx: int) -> OrderedDict[str, Any]:
        """The strategy takes both, whatever the module's own step looks like; Lightning inspects it every time."""
        kwargs.update(batch=batch, batch_idx=batch_idx)
        return kwargs

    @override
    def _should_check_val_epoch(self) -> bool:
        return super()._should_check_val_epoch() if self._validates is None else self._validates

    @override
    def _should_accumulate(self) -> bool:
        return not (self._accumulated_batches_reached() or self._num_ready_batches_reached())

    @override
    def update_lr_schedulers(self, interval: str, update_plateau_schedulers: bool) -> None:
        if self.trainer.lr_scheduler_configs:
            super().update_lr_schedulers(interval, update_plateau_schedulers)


def replace_epoch_loop(trainer: pl.Trainer, hooks: UsedHooks) -> None:
    """Put a :class:`TrainingEpochLoop` where Lightning's own is, with all that it holds; not where a user's is."""
    theirs = trainer.fit_loop.epoch_loop
    if type(theirs) in (_TrainingEpochLoop, TrainingEpochLoop):
        loop = TrainingEpochLoop(trainer, theirs.min_steps, theirs.max_steps, hooks=hooks)
        vars(loop).update(vars(theirs) | {"_hooks": hooks, "_validates": None})
        trainer.fit_loop.epoch_loop = loop

"""Lightning's loops of training: without the broadcast before every batch, the right epoch after a resume, streams."""

from __future__ import annotations

from typing import Any, override

import lightning.pytorch as pl

from lightning_mimo.data.loader import ResumableLoader
from lightning_mimo.data.streams.loader import StreamLoader
from lightning_mimo.upstream.lightning import _DataFetcher, _TrainingEpochLoop


class TrainingEpochLoop(_TrainingEpochLoop):
    """Lightning's loop without one collective over all ranks, and with one decision where a clock decides.

    Epochs may differ in their number of batches, as they do where samples are packed into rows. Lightning asks once.

    Before every batch, Lightning broadcasts from rank 0 whether it has received SIGTERM, and every rank reads the
    result from its device. Here a signal to any rank is part of the all-reduce that every step performs anyway, see
    :mod:`lightning_mimo.launch.preemption`.
    """

    @override
    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Set the number of batches of this epoch, whose order is known by now; begin a stream, which has none."""
        if isinstance(self.trainer.train_dataloader, StreamLoader):
            self._begin_stream(self.trainer.train_dataloader, data_fetcher)
            super().on_run_start(data_fetcher)
            return
        loader = data_fetcher.combined_loader
        limits = [_limited(len(each), self.trainer.limit_train_batches) for each in loader.flattened]
        is_another = loader.limits != limits and all(isinstance(each, ResumableLoader) for each in loader.flattened)
        if is_another:
            loader.limits = [*limits]
        super().on_run_start(data_fetcher)
        if is_another:
            (batches,) = limits
            data_fetcher.length = self.trainer.fit_loop.max_batches = batches
            if isinstance(self.trainer.val_check_interval, float) and self.trainer.val_check_batch is not None:
                self.trainer.val_check_batch = max(1, int(batches * self.trainer.val_check_interval))

    def _begin_stream(self, loader: StreamLoader, data_fetcher: _DataFetcher) -> None:
        """Load the first batch, which Lightning does before the epoch is set, where it does not do so once more."""
        loader.begin(limit=data_fetcher.length)
        trainer = self.trainer
        if trainer.current_epoch == 0 or trainer.fit_loop.is_resuming or self.restarting:
            iter(data_fetcher)

    @override
    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        """Let rank 0 decide where a clock decides (``val_check_interval=timedelta(...)``): each rank has its own."""
        decision = super()._should_check_val_fx(data_fetcher)
        # Lightning has no number of batches then.
        return self.trainer.strategy.broadcast(decision) if self.trainer.val_check_batch is None else decision

    @override
    def _broadcast_sigterm_tensor(self) -> None:
        """Do nothing: the all-reduce of the step carries the signal."""


def _limited(batches: int, limit: int | float) -> int:
    """Batches of an epoch under ``Trainer(limit_train_batches=...)``."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def replace_epoch_loop(trainer: pl.Trainer) -> None:
    """Replace Lightning's loop by a :class:`TrainingEpochLoop` in the same state. A user's own loop is kept."""
    theirs = trainer.fit_loop.epoch_loop
    if type(theirs) is _TrainingEpochLoop:
        trainer.fit_loop.epoch_loop = ours = TrainingEpochLoop(trainer, theirs.min_steps, theirs.max_steps)
        vars(ours).update(vars(theirs))


def begin_next_epoch(trainer: pl.Trainer) -> None:
    """Let Lightning count the next epoch, if training resumes after the last batch of one.

    Lightning then counts the epoch as processed, but does not count the start of the next one. A checkpoint of the next
    epoch's end would look like one of its start, and a run that resumes from it would train on that epoch again. Call
    it in ``on_train_start``.
    """
    loop: Any = trainer.fit_loop
    epochs = loop.epoch_progress.current
    if loop.restarted_mid_epoch and epochs.processed == epochs.started:
        loop.reset_restart_stage()

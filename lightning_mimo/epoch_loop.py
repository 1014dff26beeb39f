"""Lightning's loop over the batches of an epoch, without its collective before every batch."""

from __future__ import annotations

from typing import override

import lightning.pytorch as pl
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class TrainingEpochLoop(_TrainingEpochLoop):
    """Does not ask rank 0 for a SIGTERM: that a rank has been told to end travels with the step's collective."""

    @override
    def _broadcast_sigterm_tensor(self) -> None:
        """Nothing."""


def take_the_place_of_epoch_loop(trainer: pl.Trainer) -> None:
    """Put a :class:`TrainingEpochLoop` where Lightning's own is, with all that it holds; not where a user's is."""
    theirs = trainer.fit_loop.epoch_loop
    if type(theirs) is _TrainingEpochLoop:
        loop = TrainingEpochLoop(trainer, theirs.min_steps, theirs.max_steps)
        vars(loop).update(vars(theirs))
        trainer.fit_loop.epoch_loop = loop

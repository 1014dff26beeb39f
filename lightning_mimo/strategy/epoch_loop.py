"""Lightning's loop over the batches of an epoch, without its broadcast in every batch."""

from __future__ import annotations

from typing import override

import lightning.pytorch as pl

from lightning_mimo.upstream.lightning import _TrainingEpochLoop


class TrainingEpochLoop(_TrainingEpochLoop):
    """Lightning's loop as it is, but for one collective over all ranks.

    Before every batch, Lightning has rank 0 broadcast whether it has received SIGTERM, and every rank reads the answer
    from its device. Here a signal to any rank travels with the all-reduce that every step has anyway, see
    :mod:`lightning_mimo.launch.preemption`.
    """

    @override
    def _broadcast_sigterm_tensor(self) -> None:
        """Do nothing."""


def replace_epoch_loop(trainer: pl.Trainer) -> None:
    """Put a :class:`TrainingEpochLoop` in the place of Lightning's own, in the same state; never of a user's."""
    theirs = trainer.fit_loop.epoch_loop
    if type(theirs) is _TrainingEpochLoop:
        trainer.fit_loop.epoch_loop = ours = TrainingEpochLoop(trainer, theirs.min_steps, theirs.max_steps)
        vars(ours).update(vars(theirs))

"""Lightning's loop over the batches of an epoch, without what it asks before every batch."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, override

import lightning.pytorch as pl
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class TrainingEpochLoop(_TrainingEpochLoop):
    """Does not ask rank 0 for a SIGTERM: that a rank has been told to end travels with the step's collective.

    Nor does it ask the module what its step takes.
    """

    @override
    def _broadcast_sigterm_tensor(self) -> None:
        """Nothing."""

    @override
    def _build_kwargs(self, kwargs: OrderedDict[str, Any], batch: Any, batch_idx: int) -> OrderedDict[str, Any]:
        """The strategy takes both, whatever the module's own step looks like; Lightning inspects it every time."""
        kwargs.update(batch=batch, batch_idx=batch_idx)
        return kwargs


def take_the_place_of_epoch_loop(trainer: pl.Trainer) -> None:
    """Put a :class:`TrainingEpochLoop` where Lightning's own is, with all that it holds; not where a user's is."""
    theirs = trainer.fit_loop.epoch_loop
    if type(theirs) is _TrainingEpochLoop:
        loop = TrainingEpochLoop(trainer, theirs.min_steps, theirs.max_steps)
        vars(loop).update(vars(theirs))
        trainer.fit_loop.epoch_loop = loop

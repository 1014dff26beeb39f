"""The moment at which a run that goes on from no checkpoint takes its initial weights from files."""

from __future__ import annotations

from collections.abc import Callable
from typing import override

import lightning.pytorch as pl


class LoadInitialWeights(pl.Callback):
    """Calls a function when the Trainer has restored its checkpoint, if any, and before anything reads weights.

    MimoStrategy puts it before all other callbacks: Lightning has no hook of its own between the two.
    """

    def __init__(self, load: Callable[[], None]) -> None:
        """
        Args:
            load: does nothing after the first call.
        """
        self._load = load

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load()

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load()


def load_first(callbacks: list[pl.Callback], load: Callable[[], None]) -> None:
    """Put a :class:`LoadInitialWeights` before all callbacks of a Trainer, in place of that of an earlier stage."""
    callbacks[:] = [each for each in callbacks if not isinstance(each, LoadInitialWeights)]
    callbacks.insert(0, LoadInitialWeights(load))

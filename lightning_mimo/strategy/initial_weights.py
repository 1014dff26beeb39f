"""What is asked of initial weights that come from files, and the moment at which a run takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import override

import lightning.pytorch as pl

from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.parameter_names import module_of


def check_init_missing(init_missing: Sequence[str], layout: MimoLayout, *, has_sources: bool) -> None:
    """Check the names under which weights start from the seed although others come from files.

    Args:
        init_missing: names of modules or submodules.
        layout: what runs where.
        has_sources: whether any weights come from files.

    Raises:
        ConfigError: if there are no files, or a name is of no module.
    """
    if init_missing and not has_sources:
        raise ConfigError(
            f"init_missing={list(init_missing)} says what init_from does not hold, but init_from is not set. "
            f"Set it, or leave init_missing out."
        )
    for name in init_missing:
        if module_of(name) not in layout.modules:
            raise ConfigError(
                f"init_missing={name!r}: there is no module {module_of(name)!r}; the layout has "
                f"{', '.join(map(repr, layout.modules))}."
            )


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

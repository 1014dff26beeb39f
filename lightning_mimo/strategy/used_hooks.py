"""Lightning's hooks of a batch, called where somebody has them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer import call


class UsedHooks:
    """Knows which hooks a callback, the module or the LightningDataModule overrides; Lightning calls them all."""

    def __init__(self, trainer: pl.Trainer, base: type[pl.LightningModule]) -> None:
        """
        Args:
            trainer: whose callbacks and module are asked. Callbacks may come and go.
            base: the class of modules whose hooks do nothing that would be missed.
        """
        self._trainer = trainer
        self._base = base
        self._callbacks: list[pl.Callback] = []
        self._used: dict[str, tuple[bool, bool]] = {}

    def call(self, name: str, *args: Any, **kwargs: Any) -> None:
        """A hook of the callbacks, then of the module, as Lightning does."""
        of_callbacks, of_module = self._who_has(name)
        if of_callbacks:
            call._call_callback_hooks(self._trainer, name, *args, **kwargs)
        if of_module:
            call._call_lightning_module_hook(self._trainer, name, *args, **kwargs)

    def module_has(self, name: str) -> bool:
        """Whether the module overrides a hook, or the LightningDataModule one that they share."""
        return self._who_has(name)[1]

    def _who_has(self, name: str) -> tuple[bool, bool]:
        """Of a hook: whether any callback overrides it, and whether a module does."""
        trainer = self._trainer
        if self._callbacks != trainer.callbacks:
            self._callbacks = list(trainer.callbacks)
            self._used.clear()
        if name not in self._used:
            data = trainer.datamodule
            self._used[name] = (
                any(_overrides(callback, name, pl.Callback) for callback in self._callbacks),
                _overrides(trainer.lightning_module, name, self._base)
                or (data is not None and _overrides(data, name, pl.LightningDataModule)),
            )
        return self._used[name]


def _overrides(owner: object, name: str, base: type) -> bool:
    own = vars(owner).get(name) or getattr(type(owner), name, None)
    return own is not getattr(base, name, None)

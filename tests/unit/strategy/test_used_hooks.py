"""Which hooks somebody has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_mimo import MimoModule
from lightning_mimo.strategy.used_hooks import UsedHooks


class Watches(pl.Callback):
    def on_train_batch_start(self, *args: Any) -> None:
        """Something."""


class Clips(MimoModule):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Something."""


class Moves(pl.LightningDataModule):
    def transfer_batch_to_device(self, *args: Any) -> None:
        """Something."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    for what in ("callback_hooks", "lightning_module_hook"):
        monkeypatch.setattr(
            f"lightning_mimo.strategy.used_hooks.call._call_{what}",
            lambda _, name, *args, what=what: calls.append(what),
        )
    return calls


def hooks_of(module: MimoModule, *callbacks: pl.Callback, data: pl.LightningDataModule | None = None) -> UsedHooks:
    return UsedHooks(SimpleNamespace(callbacks=list(callbacks), lightning_module=module, datamodule=data), MimoModule)


def test_what_nobody_has_is_not_called(called: list[str]) -> None:
    hooks = hooks_of(MimoModule(), pl.Callback())
    for name in ("on_train_batch_start", "on_before_optimizer_step", "configure_gradient_clipping"):
        hooks.call(name)
        assert not hooks.module_has(name)
    assert called == []


def test_callbacks_come_before_the_module(called: list[str]) -> None:
    module = Clips()
    hooks = hooks_of(module, pl.Callback(), Watches())
    hooks.call("on_train_batch_start")
    hooks.call("configure_gradient_clipping")
    assert called == ["callback_hooks", "lightning_module_hook"]
    module.on_train_batch_end = lambda *args: None  # by an instance alone
    hooks.call("on_train_batch_end")
    assert called[2:] == ["lightning_module_hook"]


def test_a_callback_may_come_later(called: list[str]) -> None:
    hooks = hooks_of(MimoModule())
    hooks.call("on_train_batch_start")
    hooks._trainer.callbacks.append(Watches())
    hooks.call("on_train_batch_start")
    assert called == ["callback_hooks"]


def test_a_datamodule_has_hooks_of_the_transfer() -> None:
    assert hooks_of(MimoModule(), data=Moves()).module_has("transfer_batch_to_device")
    assert not hooks_of(MimoModule(), data=Moves()).module_has("on_after_batch_transfer")

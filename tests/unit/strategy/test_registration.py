"""``Trainer(strategy="mimo")``: known as soon as Lightning and this package are, and says what to write."""

from __future__ import annotations

import importlib
import subprocess
import sys

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import StrategyRegistry

import lightning_mimo.strategy.registration as registration
from lightning_mimo import MimoStrategy, ModuleParallelism


def test_the_name_alone_is_refused_with_what_to_write() -> None:
    registration.register()
    with pytest.raises(
        ValueError, match=r"strategy='mimo' does not say which modules.*MimoStrategy\(modules=\{'images'"
    ):
        pl.Trainer(strategy="mimo", logger=False)


def test_a_layout_gets_a_name_by_lightnings_registry() -> None:
    modules = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}
    StrategyRegistry.register("mimo_4_ranks", MimoStrategy, modules=modules, global_batch_size=64)
    strategy = pl.Trainer(accelerator="cpu", devices=4, strategy="mimo_4_ranks", logger=False).strategy
    assert isinstance(strategy, MimoStrategy)
    assert strategy.validate().modules["language"].tp == 2


def test_the_package_loads_nothing_where_lightning_is_not_loaded() -> None:
    code = "import sys, lightning_mimo; assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_registers_it_where_lightning_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    StrategyRegistry.remove("mimo")
    monkeypatch.delitem(sys.modules, "lightning_mimo")
    importlib.import_module("lightning_mimo")
    assert "mimo" in StrategyRegistry

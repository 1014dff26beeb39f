"""Registers the name ``"mimo"`` in Lightning's registry of strategies."""

from __future__ import annotations

from typing import NoReturn

from lightning.pytorch.strategies import StrategyRegistry

from lightning_mimo.errors import ConfigError


def register() -> None:
    """Register ``Trainer(strategy="mimo")``, which raises an error that says what to write. Idempotent."""
    if "mimo" not in StrategyRegistry:
        StrategyRegistry.register(
            "mimo", _refuse, description="megatron-core's MimoModel, every module on its own grid"
        )


def _refuse() -> NoReturn:
    """Raise an error: the name alone defines neither the modules nor the global batch size.

    Both must be known before any process starts, that is, before a model or a DataLoader exists.
    """
    raise ConfigError(
        "strategy='mimo' does not say which modules there are, nor the global batch size. Write "
        "Trainer(strategy=MimoStrategy(modules={'images': ModuleParallelism(), 'language': ModuleParallelism()}, "
        "global_batch_size=64, colocate=True)), or in a config trainer.strategy: {class_path: "
        "lightning_mimo.MimoStrategy, init_args: {modules: {images: {}, language: {}}, global_batch_size: 64, "
        "colocate: true}}; this puts a replica of every module on each rank."
    )

"""Adapts a Trainer whose strategy is MimoStrategy: signals, callbacks and loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl

from lightning_mimo.callbacks.model_summary import replace_model_summary
from lightning_mimo.launch.preemption import Preemption, Signals
from lightning_mimo.strategy.epoch_loop import replace_epoch_loop
from lightning_mimo.strategy.initial_weights import load_first

if TYPE_CHECKING:
    from lightning_mimo.strategy.strategy import MimoStrategy


def set_up_trainer(strategy: MimoStrategy, trainer: pl.Trainer) -> Signals:
    """Adapt a Trainer to the strategy. Called in every stage, before the Trainer registers its signal handlers.

    Args:
        strategy: its run, which need not exist yet, says when to stop and loads initial weights.
        trainer: the Trainer.

    Returns:
        The signals that this rank receives while the stage runs.
    """
    environment = strategy.cluster_environment
    # Lightning's distributed sampler would give every rank different samples; the package shards the data itself.
    trainer._accelerator_connector.use_distributed_sampler = False
    trainer._signal_connector = signals = Signals(trainer, environment)
    callbacks: list[pl.Callback] = vars(trainer)["callbacks"]  # the Trainer's connector sets it
    callbacks[:] = [each for each in callbacks if not isinstance(each, Preemption)]
    callbacks.append(Preemption(lambda: strategy.run.batches.must_stop, signals, environment))
    load_first(callbacks, lambda: strategy.run.load_initial(strategy.optimizers))
    replace_model_summary(callbacks)
    replace_epoch_loop(trainer)
    # Megatron caches rotary embeddings, and tensors that are created in inference mode cannot be used in training.
    fit_validation = trainer.fit_loop.epoch_loop.val_loop
    for loop in (fit_validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False
    return signals

"""What is different in a Trainer whose strategy is MimoStrategy."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl

from lightning_mimo.callbacks.model_summary import replace_model_summary
from lightning_mimo.launch.preemption import Preemption, Signals
from lightning_mimo.strategy.epoch_loop import replace_epoch_loop


def set_up_trainer(trainer: pl.Trainer, environment: object, *, must_stop: Callable[[], bool]) -> Signals:
    """Set what the strategy needs of the Trainer, before it registers its signal handlers. Called for every stage.

    Args:
        trainer: the Trainer.
        environment: Lightning's ClusterEnvironment.
        must_stop: whether the batch that just ended is the last one; the same on every rank.

    Returns:
        What this rank is told to do while the stage is running.
    """
    # The strategy is distributed, but Lightning's sampler would give every rank samples of its own.
    trainer._accelerator_connector.use_distributed_sampler = False
    trainer._signal_connector = signals = Signals(trainer, environment)
    callbacks: list[pl.Callback] = vars(trainer)["callbacks"]  # the Trainer's connector sets it
    callbacks[:] = [each for each in callbacks if not isinstance(each, Preemption)]
    callbacks.append(Preemption(must_stop, signals, environment))
    replace_model_summary(callbacks)
    replace_epoch_loop(trainer)
    # Megatron caches rotary embeddings, and those made in inference mode could not be trained with afterwards.
    fit_validation = trainer.fit_loop.epoch_loop.val_loop
    for loop in (fit_validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False
    return signals

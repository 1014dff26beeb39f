"""What Lightning offers and modules on grids of their own cannot do: refused by name, before any process exists."""

from __future__ import annotations

import inspect
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.callbacks.finetuning import BaseFinetuning
from lightning.pytorch.utilities.enums import GradClipAlgorithmType

from lightning_mimo.errors import ConfigError

# Subclasses are refused with them: EMAWeightAveraging, BackboneFinetuning.
_REFUSED = {
    StochasticWeightAveraging: (
        "it averages a copy of this rank's modules and swaps weights behind DDP's buffers. Leave it out, and average "
        "the weights of several checkpoints (lightning-mimo checkpoint export) after training"
    ),
    WeightAveraging: (
        "it averages a copy of this rank's modules and swaps weights behind DDP's buffers. Leave it out, and average "
        "the weights of several checkpoints (lightning-mimo checkpoint export) after training"
    ),
    BaseFinetuning: (
        "it changes what is trained after DDP and the optimizer were built. Say it at the start, "
        "MimoModule(frozen=['images.encoders']), and go on from the checkpoint with another frozen"
    ),
    ModelPruning: "it would prune each rank's shards by themselves. Prune an exported checkpoint",
    BatchSizeFinder: (
        "the batch size is MimoStrategy(global_batch_size=...), which the layout must divide. Leave it out; "
        "num_microbatches is what changes the memory"
    ),
    LearningRateFinder: (
        "it drives one learning rate for all modules and restores the start from a checkpoint of one rank. Leave it "
        "out, and compare short runs with other --model.lr"
    ),
    OnExceptionCheckpoint: (
        "a checkpoint takes all ranks, and an exception may be on one of them only, so it would wait for ever. Leave "
        "it out; ModelCheckpoint(every_n_train_steps=...) bounds what is lost, and SIGTERM saves by itself"
    ),
}


def check_trainer(trainer: pl.Trainer, module: pl.LightningModule | None) -> None:
    """Refuse callbacks and options of the Trainer that could not do what they promise.

    Args:
        trainer: its strategy is connected.
        module: what it runs, if that is known yet.

    Raises:
        ConfigError: naming the callback or option, the reason and the remedy.
    """
    callbacks: list[pl.Callback] = vars(trainer)["callbacks"]  # the Trainer's connector sets it
    for callback in tuple(callbacks):
        try:
            _check_callback(callback)
        except ValueError:
            callbacks.remove(callback)  # or one that saves at exceptions would try to, and hide this one
            raise
    strategy: Any = trainer.strategy
    if strategy._layer_sync is not None:
        raise ConfigError(
            "Trainer(sync_batchnorm=True) is not supported by MimoStrategy: ranks of different modules have no batch "
            "in common. Leave it out, and use LayerNorm or GroupNorm, which do not depend on the batch."
        )
    if trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
        raise ConfigError(
            "Trainer(gradient_clip_algorithm='value') is not supported by MimoStrategy: Megatron clips by the norm "
            "over all modules. Leave it out, or set it to 'norm'."
        )
    if type(strategy.checkpoint_io) is not TorchCheckpointIO:
        raise ConfigError(
            f"{type(strategy.checkpoint_io).__name__} is not supported by MimoStrategy: checkpoints are directories "
            f"that all ranks write at once. Leave the plugin out; MimoStrategy(saving=Saving(asynchronous=True)) "
            f"writes behind the training."
        )
    if module is not None:
        _check_module(module)


def _check_module(module: pl.LightningModule) -> None:
    if not module.automatic_optimization:
        raise ConfigError(
            f"{type(module).__name__}.automatic_optimization=False is not supported by MimoStrategy: the pipeline "
            f"schedule runs the backward passes. Leave it out, and override loss() and configure_optimizers()."
        )
    for name in ("training_step", "validation_step", "test_step", "predict_step"):
        signature = inspect.signature(getattr(module, name))
        if not (_accepts(signature, 2) or _accepts(signature, 3)):  # the third is dataloader_idx
            raise ConfigError(
                f"{type(module).__name__}.{name}{signature} does not take what MimoStrategy gives it, a microbatch and "
                f"the number of its batch. Write def {name}(self, batch, batch_idx)."
            )


def _accepts(signature: inspect.Signature, arguments: int) -> bool:
    try:
        signature.bind(*range(arguments))
    except TypeError:
        return False
    return True


def _check_callback(callback: pl.Callback) -> None:
    name = type(callback).__name__
    for refused, reason in _REFUSED.items():
        if isinstance(callback, refused):
            raise ConfigError(f"The callback {name} is not supported by MimoStrategy: {reason}.")
    if getattr(callback, "save_on_exception", False):
        raise ConfigError(
            f"{name}(save_on_exception=True) is not supported by MimoStrategy: "
            f"{_REFUSED[OnExceptionCheckpoint].partition('. ')[0]}. Set it to False; every_n_train_steps=... bounds "
            f"what is lost, and SIGTERM saves by itself."
        )

"""Rejects callbacks and Trainer options that MimoStrategy does not support, before any process starts."""

from __future__ import annotations

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

from lightning_mimo.data import ChatData
from lightning_mimo.errors import ConfigError
from lightning_mimo.strategy.local_paths import check_paths
from lightning_mimo.strategy.module_check import check_module

# Subclasses such as EMAWeightAveraging and BackboneFinetuning are rejected, too.
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
        "it freezes or unfreezes parameters after DDP and the optimizer were built. Freeze them at the start with "
        "MimoModule(frozen=['images.encoders']), and begin the next run from the weights of a checkpoint (init_from) "
        "with another value of frozen"
    ),
    ModelPruning: "it would prune each rank's shards separately. Prune an exported checkpoint",
    BatchSizeFinder: (
        "the batch size is MimoStrategy(global_batch_size=...), which the layout must divide. Leave it out, and change "
        "num_microbatches to change the memory that is needed"
    ),
    LearningRateFinder: (
        "it sets one learning rate for all modules and restores the initial state from a checkpoint of one rank. Leave "
        "it out, and compare short runs with different --model.lr"
    ),
    OnExceptionCheckpoint: (
        "all ranks must write a checkpoint together, but an exception may occur on one of them only, so saving would "
        "wait forever. Leave it out; ModelCheckpoint(every_n_train_steps=...) limits the lost work, and SIGTERM saves "
        "a checkpoint without it"
    ),
}


def check_trainer(trainer: pl.Trainer, module: pl.LightningModule | None) -> None:
    """Check that MimoStrategy supports the callbacks and options of a Trainer, and that its data is there.

    Args:
        trainer: a Trainer whose strategy is connected.
        module: the module that it runs, if already known.

    Raises:
        ConfigError: naming the callback, option or file, the reason and the remedy.
    """
    callbacks: list[pl.Callback] = vars(trainer)["callbacks"]  # the Trainer's connector sets it
    for callback in tuple(callbacks):
        try:
            _check_callback(callback)
        except ValueError:
            callbacks.remove(callback)  # otherwise it might save on this exception, and hide it
            raise
    strategy: Any = trainer.strategy
    if strategy._layer_sync is not None:
        raise ConfigError(
            "Trainer(sync_batchnorm=True) is not supported by MimoStrategy: ranks of different modules share no batch. "
            "Leave it out, and use LayerNorm or GroupNorm, which do not depend on the batch."
        )
    if trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
        raise ConfigError(
            "Trainer(gradient_clip_algorithm='value') is not supported by MimoStrategy: Megatron clips by the norm "
            "over all modules. Leave it out, or set it to 'norm'."
        )
    if type(strategy.checkpoint_io) is not TorchCheckpointIO:
        raise ConfigError(
            f"{type(strategy.checkpoint_io).__name__} is not supported by MimoStrategy: checkpoints are directories "
            f"that all ranks write together. Leave the plugin out; MimoStrategy(saving=Saving(asynchronous=True)) "
            f"writes them while training continues."
        )
    _check_machine(trainer, strategy.root_device.type)
    check_paths(trainer)
    if module is not None:
        check_module(module, trainer)
    if isinstance(data := getattr(trainer, "datamodule", None), ChatData):
        data.check_paths()


def _check_machine(trainer: pl.Trainer, device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ConfigError(
            f"Trainer(accelerator=...) selects {device!r}, but megatron-core runs on GPUs with CUDA and, through this "
            f"package, on CPUs. Set accelerator='cpu' or 'gpu'."
        )
    if trainer._model_registry is not None:
        raise ConfigError(
            f"Trainer(model_registry={trainer._model_registry!r}) is not supported by MimoStrategy: it uploads "
            f"checkpoints of one file, and here they are directories. Leave it out, and upload what lightning-mimo "
            f"checkpoint export writes."
        )


def _check_callback(callback: pl.Callback) -> None:
    name = type(callback).__name__
    for refused, reason in _REFUSED.items():
        if isinstance(callback, refused):
            raise ConfigError(f"The callback {name} is not supported by MimoStrategy: {reason}.")
    if getattr(callback, "save_on_exception", False):
        raise ConfigError(
            f"{name}(save_on_exception=True) is not supported by MimoStrategy: "
            f"{_REFUSED[OnExceptionCheckpoint].partition('. ')[0]}. Set it to False; every_n_train_steps=... limits "
            f"the lost work, and SIGTERM saves a checkpoint without it."
        )

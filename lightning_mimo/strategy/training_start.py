"""Checks at the start of training, when checkpoint and data are there."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer
from torch.utils.data import DataLoader

from lightning_mimo.data.streams.loader import StreamLoader
from lightning_mimo.errors import ConfigError
from lightning_mimo.mimo.replica_check import check_buffers, check_replicas, has_buffers
from lightning_mimo.optim.ddp import complete_gathering
from lightning_mimo.strategy.epoch_loop import TrainingEpochLoop, begin_next_epoch
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.own_state import check_same_on_all_ranks, own_state


def check_training_start(module: MimoModule, trainer: pl.Trainer) -> FirstStepCheck:
    """Compare what ranks hold copies of, check the training data, and begin the right epoch. Collective over the world.

    Returns:
        The check to call after every step.

    Raises:
        ReplicaError: if copies of weights differ.
        ConfigError: if there are several training DataLoaders, buffers of the module differ, or a loop of the user's
            own would have to begin a stream.
    """
    begin_next_epoch(trainer)
    _check_one_loader(trainer.train_dataloader)
    _check_loop(trainer)
    complete_gathering(module.mimo_model)
    check_replicas(module.mimo_model, module.infra)
    check_same_on_all_ranks(module)
    for callback in vars(trainer)["callbacks"]:
        if isinstance(callback, Timer):
            # Lightning asks in on_fit_start, when the time that an earlier run has used is not loaded yet.
            Timer.on_fit_start(callback, trainer)
    return FirstStepCheck(module)


class FirstStepCheck:
    """Compares buffers over ranks after the first step of a training, if there are any."""

    def __init__(self, module: MimoModule) -> None:
        """Collective over the world.

        Args:
            module: the user's module.
        """
        self._module = module
        self._is_due = has_buffers(module.mimo_model, module.infra)
        self._has_own = bool(own_state(module))

    def __call__(self) -> None:
        """Call it after every step. Collective over the world in the first one.

        Raises:
            ReplicaError: if a buffer of the model differs between replicas.
            ConfigError: if a buffer of the module differs between ranks.
        """
        if self._is_due:
            self._is_due = False
            check_buffers(self._module.mimo_model, self._module.infra)
        if self._has_own:
            self._has_own = False
            check_same_on_all_ranks(self._module)


def _check_loop(trainer: pl.Trainer) -> None:
    loop = trainer.fit_loop.epoch_loop
    if isinstance(trainer.train_dataloader, StreamLoader) and not isinstance(loop, TrainingEpochLoop):
        raise ConfigError(
            f"The Trainer has a {type(loop).__name__} of its own, which would not begin a stream: Lightning sets the "
            f"epoch after it has loaded the first batch. Use a map-style dataset, or leave the loop out."
        )


def _check_one_loader(loaders: Any) -> None:
    if not isinstance(loaders, DataLoader | StreamLoader):
        raise ConfigError(
            f"train_dataloader() returned a {type(loaders).__name__} of DataLoaders, but MimoStrategy trains on one: "
            f"concatenate the datasets (torch.utils.data.ConcatDataset), and draw from them in proportion with a "
            f"WeightedRandomSampler."
        )

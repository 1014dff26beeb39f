"""A Trainer that does nothing but train: what every benchmark measures with."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy


def quiet_trainer(
    strategy: Strategy,
    *,
    callbacks: Sequence[pl.Callback] = (),
    devices: int | None = None,
    max_steps: int = -1,
    max_epochs: int | None = None,
    gradient_clip_val: float | None = None,
    logger: Logger | None = None,
    log_every_n_steps: int = 10,
) -> pl.Trainer:
    """On CPUs, without checkpoints, progress bar and summary, and without a logger unless there is one.

    Args:
        strategy: how.
        callbacks: what measures.
        devices: processes; by default those of the world that is running.
        max_steps: when to stop.
        max_epochs: when to stop.
        gradient_clip_val: largest gradient norm.
        logger: where metrics are logged.
        log_every_n_steps: how often.
    """
    return pl.Trainer(
        accelerator="cpu",
        devices=devices or dist.get_world_size(),
        strategy=strategy,
        max_steps=max_steps,
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        gradient_clip_val=gradient_clip_val,
        use_distributed_sampler=False,  # the strategies, or their data, see to it
        logger=logger or False,
        log_every_n_steps=log_every_n_steps,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )

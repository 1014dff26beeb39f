"""A run that resumes in a later epoch trains on the batches of one that never stopped, with any number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_mimo import MimoStrategy, ModuleParallelism
from tests.parity.layouts import PoolEnvironment
from tests.parity.model import Model, ParityModule, PicturesSoundsAndText, Samples
from tests.support.rank_pool import RankPool

BATCH, BATCHES, EPOCHS = 6, 3, 3


class Sees(pl.Callback):
    """Keeps the samples of every batch, and saves once."""

    def __init__(self, path: Path | None, *, after: int) -> None:
        self.seen: list[list[int]] = []
        self._path, self._after = path, after

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        _, _, batch, _ = args
        self.seen.append([index for microbatch in batch for index in microbatch["sample_indices"]])
        if self._path is not None and len(self.seen) == self._after:
            trainer.save_checkpoint(self._path)


def train(
    *, workers: int = 0, generator: bool, save: Path | None = None, after: int = 0, resume: Path | None = None
) -> list[list[int]]:
    torch.manual_seed(1)
    modules = {"images": ModuleParallelism(), "language": ModuleParallelism()}
    strategy = MimoStrategy(modules, BATCH, colocate=True, cluster_environment=PoolEnvironment())
    sees = Sees(save, after=after)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=EPOCHS,
        callbacks=[sees],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(
        PicturesSoundsAndText(Samples(number=BATCH * BATCHES)),
        batch_size=BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(3) if generator else None,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    trainer.fit(ParityModule(Model()), loader, ckpt_path=resume)
    strategy.infra.destroy()
    return sees.seen


def compare(folder: Path) -> None:
    for generator in (False, True):
        # In the middle of epoch 1, and at its last batch, where Lightning has not counted the epoch yet.
        for after in (4, 6):
            path = folder / f"{generator}-{after}.ckpt"
            whole = train(generator=generator, save=path, after=after)
            assert len({tuple(batch) for batch in whole}) == EPOCHS * BATCHES
            for workers in (0, 1):
                found = train(workers=workers, generator=generator, resume=path)
                assert found == whole[after:], (generator, after, workers)


def compare_resumed_twice(folder: Path) -> None:
    whole = train(generator=False)
    # At the last batches of two epochs; at the last batch of one epoch and in the middle of the next.
    for first, second in ((3, 6), (3, 4)):
        train(generator=False, save=folder / f"{second}-a.ckpt", after=first)
        resumed = train(
            generator=False, resume=folder / f"{second}-a.ckpt", save=folder / f"{second}-b.ckpt", after=second - first
        )
        assert resumed == whole[first:]
        assert train(generator=False, resume=folder / f"{second}-b.ckpt") == whole[second:], (first, second)


def test_batches_after_a_second_resume_are_those_of_a_run_that_never_stopped(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    rank_pool.run(compare_resumed_twice, tmp_path, world_size=1)


def test_batches_after_a_resume_are_those_of_a_run_that_never_stopped(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(compare, tmp_path, world_size=1)

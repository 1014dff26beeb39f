"""A run over a stream learns what one over a dataset does, goes on anywhere, and ends on all ranks at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.data import StreamDataset
from lightning_mimo.errors import DataError
from tests.parity.layouts import PoolEnvironment
from tests.parity.model import Model, ParityModule, PicturesSoundsAndText, Samples
from tests.support.rank_pool import RankPool

BATCH, SAMPLES = 6, 15  # three batches, of which the last is short
DATASET = PicturesSoundsAndText(Samples(number=SAMPLES))
APART = {"images": ModuleParallelism(), "language": ModuleParallelism(pp=2)}
TOGETHER = {"images": ModuleParallelism(), "language": ModuleParallelism()}
OTHER = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism()}


class Stream(IterableDataset):
    """Samples one after another; on rank 1 maybe more than on others."""

    def __init__(self, number: int = SAMPLES, more: int = 0) -> None:
        self._number, self._more = number, more

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = self._number + self._more * (dist.get_rank() == 1)
        return (DATASET[index % SAMPLES] for index in range(number))


class Sees(pl.Callback):
    """Keeps what was trained on, and saves once."""

    def __init__(self, path: Path | None, after: int) -> None:
        self.losses: list[float] = []
        self.last: list[bool] = []
        self.validated = 0
        self._path, self._after = path, after

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.last.append(trainer.is_last_batch)
        if self._path is not None and len(self.losses) == self._after:
            trainer.save_checkpoint(self._path)

    def on_validation_epoch_end(self, *_: Any) -> None:
        self.validated += 1


def train(
    data: Any,
    modules: Mapping[str, ModuleParallelism] = APART,
    *,
    val: Any = None,
    workers: int = 0,
    save: Path | None = None,
    after: int = 0,
    resume: Path | None = None,
    **options: Any,
) -> Sees:
    torch.manual_seed(1)
    microbatches = 2 if modules is APART else 1
    strategy = MimoStrategy(
        modules, BATCH, microbatches, colocate=modules is TOGETHER, cluster_environment=PoolEnvironment()
    )
    sees = Sees(save, after)
    ranks = 1 if modules is TOGETHER else 3
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        precision="64-true",
        **{"max_epochs": 2, **options},
        callbacks=[sees],
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = [each if each is None else DataLoader(each, num_workers=workers) for each in (data, val)]
    trainer.fit(ParityModule(Model()), *loaders, ckpt_path=resume)
    strategy.infra.destroy()
    return sees


def compare_with_dataset(folder: Path) -> None:
    expected = train(DATASET, val=DATASET)
    found = train(Stream(), val=Stream(), save=folder / "saved.ckpt", after=4)
    assert found.losses == expected.losses and len(found.losses) == 6
    assert found.last == expected.last == [False, False, True] * 2
    assert found.validated == expected.validated == 2
    # Two batches make a step, and the last batch of an epoch one alone.
    accumulated = train(DATASET, accumulate_grad_batches=2).losses
    assert train(Stream(), accumulate_grad_batches=2).losses == accumulated
    assert train(Stream(), limit_train_batches=2, max_epochs=1).losses == expected.losses[:2]
    assert train(Stream(), max_steps=5, max_epochs=-1).losses == expected.losses[:5]
    resumed = train(Stream(), resume=folder / "saved.ckpt", workers=1)
    assert resumed.losses == expected.losses[4:] and resumed.last == [False, True]
    elsewhere = train(StreamDataset(Stream()), OTHER, resume=folder / "saved.ckpt")
    assert elsewhere.losses == pytest.approx(expected.losses[4:], rel=1e-11)


def end_early() -> None:
    expected = train(Stream(2 * BATCH), max_epochs=1)
    longer = train(Stream(2 * BATCH, more=2 * BATCH), val=Stream(BATCH, more=BATCH), max_epochs=1)
    assert longer.losses == expected.losses and longer.last == [False, True]
    assert longer.validated == 1


def test_a_stream_is_learned_from_as_a_dataset_is(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(compare_with_dataset, tmp_path, world_size=3)


def test_a_stream_that_ends_on_one_rank_ends_the_epoch_on_all(rank_pool: RankPool) -> None:
    rank_pool.run(end_early, world_size=3)


def change_of_kind(folder: Path) -> None:
    train(Stream(), TOGETHER, save=folder / "stream.ckpt", after=1)
    train(DATASET, TOGETHER, save=folder / "dataset.ckpt", after=1)
    with pytest.raises(DataError, match=r"in the middle of an epoch of a stream, but the training dataset has 15 now"):
        train(DATASET, TOGETHER, resume=folder / "stream.ckpt")
    with pytest.raises(DataError, match=r"in the middle of an epoch of 15 samples, but the training data is a stream"):
        train(Stream(), TOGETHER, resume=folder / "dataset.ckpt")
    with pytest.raises(DataError, match=r"limit_train_batches=4\), but the stream Stream has ended after 3 batches"):
        train(Stream(), TOGETHER, limit_train_batches=4)


def test_streams_and_datasets_are_told_apart(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(change_of_kind, tmp_path, world_size=1)

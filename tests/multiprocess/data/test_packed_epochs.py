"""Packed training through the Trainer: epochs of different numbers of batches, evaluation, resumption, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.data import packing
from lightning_mimo.errors import ConfigError, DataError
from tests.parity.layouts import PoolEnvironment
from tests.parity.model import Model, ParityModule, PicturesSoundsAndText, Samples
from tests.support.rank_pool import RankPool

ROWS, SAMPLES, BUDGET, EPOCHS = 4, 37, 16, 3


class Sees(pl.Callback):
    """Keeps what every batch of an epoch has, how many the Trainer expects, and saves once."""

    def __init__(self, path: Path | None, *, after: int) -> None:
        self.epochs: dict[int, list[list[int]]] = {}
        self.expected: dict[int, int] = {}
        self.paddings: list[float] = []
        self.validations: dict[int, float] = {}
        self._path, self._after = path, after

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        _, _, batch, _ = args
        own = [
            index
            for microbatch in batch
            for index, fills in zip(microbatch["sample_indices"], microbatch["is_padding"], strict=True)
            if not fills
        ]
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        seen = self.epochs.setdefault(trainer.current_epoch, [])
        seen.append(sorted(index for each in ranks for index in each))
        self.expected[trainer.current_epoch] = trainer.num_training_batches
        self.paddings.append(float(trainer.callback_metrics["train/padding"]))
        if self._path is not None and sum(map(len, self.epochs.values())) == self._after:
            trainer.save_checkpoint(self._path)

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        done = len(self.epochs.get(trainer.current_epoch, []))
        self.validations[100 * trainer.current_epoch + done] = float(trainer.callback_metrics["val/loss"])


def trainer_of(pack_to: int | None, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    torch.manual_seed(1)
    modules = {"images": ModuleParallelism(tp=2), "language": ModuleParallelism(dp=2)}
    return pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=MimoStrategy(modules, ROWS, colocate=True, pack_to=pack_to, cluster_environment=PoolEnvironment()),
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def data(number: int, *, shuffle: bool = False, generator: bool = False, workers: int = 0) -> DataLoader:
    return DataLoader(
        PicturesSoundsAndText(Samples(number=number)),
        batch_size=ROWS,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(3) if generator else None,
        num_workers=workers,
    )


def fit(
    *, save: Path | None = None, after: int = 0, resume: Path | None = None, generator: bool = False, workers: int = 0
) -> Sees:
    packing.LOOK_AHEAD = 4  # so that epochs differ
    sees = Sees(save, after=after)
    trainer = trainer_of(BUDGET, sees, max_epochs=EPOCHS, val_check_interval=0.5, num_sanity_val_steps=0)
    loader = data(SAMPLES, shuffle=True, generator=generator, workers=workers)
    trainer.fit(ParityModule(Model()), loader, data(7), ckpt_path=resume)
    trainer.strategy.infra.destroy()
    return sees


def no_row_is_lost(folder: Path) -> None:
    whole = fit(save=folder / "middle", after=8)
    numbers = {epoch: len(batches) for epoch, batches in whole.epochs.items()}
    assert len(set(numbers.values())) > 1, numbers
    assert whole.expected == numbers
    for batches in whole.epochs.values():
        assert sorted(index for batch in batches for index in batch) == list(range(SAMPLES))
    # Without padding, only what fills up a short last batch is computed in vain.
    assert all(padding >= 1 for padding in whole.paddings)
    assert whole.paddings.count(1.0) >= len(whole.paddings) - EPOCHS
    halves = {epoch: max(1, int(number * 0.5)) for epoch, number in numbers.items()}
    due = {100 * epoch + done for epoch, half in halves.items() for done in range(half, numbers[epoch] + 1, half)}
    assert set(whole.validations) == due
    resumed = fit(resume=folder / "middle")
    rest = [batch for batches in whole.epochs.values() for batch in batches][8:]
    assert [batch for batches in resumed.epochs.values() for batch in batches] == rest
    with pytest.raises(DataError, match=r"middle of an epoch.*pack_to=16.*pack_to=17 is set now"):
        trainer_of(BUDGET + 1, max_epochs=1).fit(
            ParityModule(Model()), data(SAMPLES, shuffle=True), ckpt_path=folder / "middle"
        )


def a_sampler_with_a_state_goes_on(folder: Path) -> None:
    for after in (8, 14):
        whole = fit(save=folder / str(after), after=after, generator=True)
        assert whole.expected == {epoch: len(batches) for epoch, batches in whole.epochs.items()}
        resumed = fit(resume=folder / str(after), generator=True, workers=1)
        rest = [batch for batches in whole.epochs.values() for batch in batches][after:]
        assert [batch for batches in resumed.epochs.values() for batch in batches] == rest


def evaluation_is_that_of_padded_samples() -> None:
    losses = {}
    for pack_to in (None, BUDGET):
        trainer = trainer_of(pack_to)
        module = ParityModule(Model())
        (metrics,) = trainer.validate(module, data(SAMPLES), verbose=False)
        losses[pack_to] = metrics
        if pack_to is not None:
            text = PicturesSoundsAndText(Samples(number=7, images=()))
            predicted = trainer.predict(module, DataLoader(text, batch_size=ROWS))
            indices = [each["sample_index"] for batch in predicted for each in batch]
            assert indices == list(range(7))
        trainer.strategy.infra.destroy()
    assert losses[None] == pytest.approx(losses[BUDGET], rel=1e-6)
    assert {"val/loss", "val/exact_match"} <= losses[None].keys()


def refuse_what_cannot_be_packed() -> None:
    def validate(dataset: Any, *callbacks: pl.Callback, shuffle: bool = False, **model: Any) -> None:
        loader = DataLoader(dataset, batch_size=ROWS, shuffle=shuffle)
        trainer_of(BUDGET, *callbacks).validate(ParityModule(Model(), **model), loader, verbose=False)

    class Generates(pl.Callback):
        def on_validation_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, *args: Any) -> None:
            trainer.strategy.generate(batch, max_new_tokens=1)

    samples = PicturesSoundsAndText(Samples(number=ROWS))
    with pytest.raises(DataError, match=r"evaluation has a RandomSampler"):
        validate(samples, shuffle=True)
    with pytest.raises(DataError, match=r"TensorDataset does not tell them"):
        validate(torch.utils.data.TensorDataset(torch.zeros(8)))
    # Before the lengths of samples, of which each rank tells a part.
    with pytest.raises(DataError, match=r"dataset has a different length on different ranks: \{0: 5, 1: 6\}"):
        validate(PicturesSoundsAndText(Samples(number=5 + dist.get_rank())))
    with pytest.raises(ConfigError, match=r"core_attention is a DotProductAttention"):
        validate(samples, attention="megatron")
    with pytest.raises(ConfigError, match=r"generate\(\) was given a packed batch"):
        validate(samples, Generates())


def test_epochs_differ_in_their_number_of_rows_and_none_is_lost(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(no_row_is_lost, tmp_path, world_size=2)


@pytest.mark.exhaustive
def test_a_sampler_with_a_state_of_its_own_goes_on_where_it_was(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(a_sampler_with_a_state_goes_on, tmp_path, world_size=2)


def test_evaluation_is_that_of_padded_samples(rank_pool: RankPool) -> None:
    rank_pool.run(evaluation_is_that_of_padded_samples, world_size=2)


def test_what_cannot_be_packed_is_refused(rank_pool: RankPool) -> None:
    rank_pool.run(refuse_what_cannot_be_packed, world_size=2)

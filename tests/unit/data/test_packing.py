"""Samples packed into rows: every one once, none over the budget, few tokens left free, the same rows each time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, Subset

from lightning_mimo import DataError, MimoLayout, ModuleParallelism
from lightning_mimo.data.loader import GlobalBatchSampler, shard_dataloader
from lightning_mimo.data.order import SeededSampler
from lightning_mimo.data.packing import LOOK_AHEAD, Packing, check_evaluation_order, length_of, pack_rows
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.layout.batch_plan import RankBatchPlan


def lognormal(number: int) -> np.ndarray:
    """Lengths of a mean near 75, none over 300."""
    return np.clip(np.random.default_rng(0).lognormal(4.0, 0.8, number), 1, 300).astype(np.int64)


def packing(lengths: Any, budget: int) -> Packing:
    return Packing(budget=budget, lengths=np.asarray(lengths, dtype=np.int64))


def test_the_longest_goes_first_and_the_best_fit_is_taken() -> None:
    assert pack_rows(range(4), packing([5, 3, 4, 2], 7)) == [(0, 3), (1, 2)]
    assert pack_rows([3, 3, 0], packing([5, 3, 4, 2], 7)) == [(3, 0), (3,)]


@pytest.mark.parametrize("number", [0, 1, LOOK_AHEAD, 3 * LOOK_AHEAD + 17])
def test_every_sample_is_in_one_row_within_the_budget(number: int) -> None:
    lengths = lognormal(number)
    order = np.random.default_rng(1).permutation(number).tolist()
    rows = pack_rows(order, packing(lengths, 2000))
    assert sorted(index for row in rows for index in row) == list(range(number))
    assert all(sum(lengths[index] for index in row) <= 2000 for row in rows)
    assert rows == pack_rows(order, packing(lengths, 2000))


def test_no_sample_is_moved_further_than_the_look_ahead() -> None:
    order = list(range(4 * LOOK_AHEAD))
    lengths = lognormal(len(order))
    packed = [index for row in pack_rows(order, packing(lengths, 1600)) for index in row]
    assert max(abs(place - index) for place, index in enumerate(packed)) < LOOK_AHEAD


def test_rows_are_nearly_full() -> None:
    lengths = lognormal(8 * LOOK_AHEAD)
    budget = 16 * int(lengths.mean())
    rows = pack_rows(range(len(lengths)), packing(lengths, budget))
    assert len(rows) * budget / lengths.sum() < 1.05


def test_a_sample_over_the_budget_is_refused_with_its_length() -> None:
    with pytest.raises(
        DataError, match=r"Sample 2 has 9 tokens, more than the 8 .* 1 others .* up to 11 tokens.*least 11"
    ):
        pack_rows([0, 2, 1], packing([3, 11, 9], 8))


class Texts(Dataset[dict[str, Any]]):
    """Texts of some lengths."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.full((int(self.lengths[index]),), 1 + index % 7)
        return {"input_ids": ids, "labels": torch.full_like(ids, 9)}


class TellsLength(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 3

    def length(self, index: int) -> int:
        return 10 * index


def test_a_dataset_tells_lengths_through_a_subset() -> None:
    assert length_of(Texts(np.array([3, 5])))(1) == 5
    assert length_of(Subset(TellsLength(), [2, 0]))(0) == 20
    with pytest.raises(DataError, match=r"Subset|Dataset.* does not tell them. Give it a method length\(index\)"):
        length_of(Subset(Dataset(), [0]))


def loaders(dataset: Texts, *, budget: int, shuffle: bool = True, batch: int = 4) -> list[Any]:
    """Of all ranks of images dp=2, language dp=2."""
    layout = MimoLayout.resolve({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(dp=2)}, world_size=4)
    plans = [RankBatchPlan.build(layout, rank, global_batch_size=batch, num_microbatches=2) for rank in range(4)]
    return [
        shard_dataloader(
            DataLoader(dataset, batch_size=batch, shuffle=shuffle),
            plan,
            sample_format=SampleFormat(),
            seed=3,
            packing=packing(dataset.lengths, budget),
        )
        for plan in plans
    ]


def seen_in_epoch(of_ranks: list[Any], epoch: int, *, skip: int = 0) -> list[list[tuple[int, ...]]]:
    """Samples that count, of each batch, on the first language rank and the second."""
    batches = []
    for loader in of_ranks[2:]:
        loader.load_state_dict({"batches": skip})
        loader.order.set_epoch(epoch)
        found = list(loader)
        assert len(loader) - skip == len(found)
        batches.append(
            [
                tuple(
                    index
                    for each in batch
                    for index, fills in zip(each["sample_indices"], each["is_padding"], strict=True)
                    if not fills
                )
                for batch in found
            ]
        )
    return [[*one, *two] for one, two in zip(*batches, strict=True)]


def test_every_epoch_has_all_samples_once_though_its_number_of_rows_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mimo.data.packing.LOOK_AHEAD", 16)
    of_ranks = loaders(Texts(lognormal(300)), budget=300)
    numbers = []
    for epoch in range(6):
        batches = seen_in_epoch(of_ranks, epoch)
        assert sorted(index for batch in batches for index in batch) == list(range(300))
        numbers.append(len(batches))
    assert len(set(numbers)) > 1, numbers


def test_a_run_that_goes_on_in_an_epoch_sees_the_rest_of_it() -> None:
    of_ranks = loaders(Texts(lognormal(300)), budget=300)
    whole = seen_in_epoch(of_ranks, 2)
    assert seen_in_epoch(of_ranks, 2, skip=5) == whole[5:]
    assert seen_in_epoch(of_ranks, 2) == whole


def test_a_short_last_batch_is_filled_with_its_shortest_sample() -> None:
    (loader,) = loaders(Texts(np.array([4, 3, 1, 6, 5])), budget=9, shuffle=False)[3:]
    (batch,) = list(loader)
    assert [each["sample_indices"] for each in batch] == [(1, 3), (2,)]
    assert [each["is_padding"] for each in batch] == [(False, False), (True,)]


def test_the_order_of_a_sampler_with_a_state_is_not_drawn_to_count_batches() -> None:
    dataset = Texts(lognormal(64))
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(5))
    before = sampler.generator.get_state()
    order = SeededSampler(sampler, seed=1)
    batches = GlobalBatchSampler(order, batch_size=2, drop_last=False, packing=packing(dataset.lengths, 400))
    estimate = len(batches)
    assert torch.equal(sampler.generator.get_state(), before)
    assert len(list(batches)) == len(batches) and abs(len(batches) - estimate) <= 0.5 * estimate


def test_an_evaluation_in_another_order_each_time_is_refused() -> None:
    check_evaluation_order(SequentialSampler([1]), 9)
    with pytest.raises(DataError, match=r"RandomSampler.*pack_to=9.*shuffle=True"):
        check_evaluation_order(RandomSampler([1]), 9)

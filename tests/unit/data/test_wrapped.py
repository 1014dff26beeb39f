"""What a dataset tells of its samples reaches through torch's Subset and ConcatDataset."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_mimo import DataError, MimoLayout, ModuleParallelism
from lightning_mimo.data.loader import shard_dataloader
from lightning_mimo.data.packing import length_of
from lightning_mimo.data.sample_costs import SampleCosts
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.layout.batch_plan import RankBatchPlan

MODULES = ("language",)


class Tells(Dataset[dict[str, Any]]):
    """Its samples are its number and their index, which is also their cost and their length."""

    def __init__(self, number: int, samples: int) -> None:
        self.number, self.samples = number, samples
        self.asked: list[tuple[int, frozenset[str]]] = []

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise AssertionError("load() is there")

    def load(self, index: int, modules: frozenset[str]) -> dict[str, Any]:
        self.asked.append((index, modules))
        return {"input_ids": [self.number, index], "labels": [index, -100]}

    def length(self, index: int) -> int:
        return 100 * self.number + index

    def cost(self, index: int) -> float:
        return 100.0 * self.number + index


class Plain(Dataset[dict[str, Any]]):
    """Tells nothing."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": [9, index], "labels": [index, -100]}


class Reversed(ConcatDataset[dict[str, Any]]):
    """Changes what is at an index, so nothing may be asked past it."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": [7, index], "labels": [index, -100]}


class OwnCosts(ConcatDataset[dict[str, Any]]):
    def cost(self, index: int) -> float:
        return -index + 50.0


def nested() -> Dataset:
    """Samples (1, 0), (1, 1), (3, 2), (2, 4), (2, 1) as (number, index)."""
    return ConcatDataset([Tells(1, 2), ConcatDataset([Subset(Tells(3, 4), [2]), Subset(Tells(2, 5), [4, 1])])])


TOLD = [100, 101, 302, 204, 201]


def loaded(dataset: Dataset, number: int) -> list[list[int]]:
    layout = MimoLayout.resolve({"language": ModuleParallelism()}, world_size=1)
    plan = RankBatchPlan.build(layout, 0, global_batch_size=number, num_microbatches=1)
    loader = shard_dataloader(
        DataLoader(dataset, batch_size=number), plan, sample_format=SampleFormat(), seed=1, balance=False
    )
    ((batch,),) = loader
    return batch["input_ids"].tolist()


def costs_of(dataset: Dataset, number: int) -> list[float] | None:
    costs = SampleCosts.of_dataset(dataset, modules=MODULES)
    return None if costs is None else costs.of(range(number))["language"].tolist()


def test_load_cost_and_length_reach_the_dataset_of_each_sample() -> None:
    assert loaded(nested(), 5) == [[1, 0], [1, 1], [3, 2], [2, 4], [2, 1]]
    assert costs_of(nested(), 5) == TOLD
    assert list(map(length_of(nested()), range(5))) == TOLD


def test_every_part_is_asked_for_modules_of_the_rank_only() -> None:
    parts = [Tells(1, 2), Tells(2, 3)]
    loaded(ConcatDataset(parts), 5)
    assert [part.asked for part in parts] == [
        [(index, frozenset(MODULES)) for index in range(samples)] for samples in (2, 3)
    ]


def test_a_part_that_tells_nothing() -> None:
    mixed = ConcatDataset([Tells(1, 2), Plain()])
    assert loaded(mixed, 4) == [[1, 0], [1, 1], [9, 0], [9, 1]]
    assert costs_of(mixed, 4) is None
    with pytest.raises(DataError, match=r"Plain does not tell them\. Give it a method length"):
        length_of(mixed)


def test_a_subclass_that_changes_samples_is_not_looked_into() -> None:
    changed = Reversed([Tells(1, 2), Tells(2, 2)])
    assert loaded(changed, 4) == [[7, index] for index in range(4)]
    assert costs_of(changed, 4) is None
    with pytest.raises(DataError, match="Reversed does not tell them"):
        length_of(changed)


def test_what_a_subclass_tells_itself_comes_first() -> None:
    assert costs_of(OwnCosts([Tells(1, 2)]), 2) == [50.0, 49.0]
    assert costs_of(OwnCosts([TensorDataset(torch.ones(2))]), 2) == [50.0, 49.0]


def test_a_refused_cost_names_the_index_in_the_whole() -> None:
    class Bad(Tells):
        def cost(self, index: int) -> float:
            return -1.0

    with pytest.raises(DataError, match=r"Sample 1: Bad/Tells\.cost is -1"):
        costs_of(ConcatDataset([Tells(0, 1), Bad(1, 1)]), 2)

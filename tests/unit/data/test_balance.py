"""Samples of a global batch, ordered by their costs; costs that are refused; what the order leaves as it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, SequentialSampler, Subset

from lightning_mimo import DataError, MimoLayout, ModuleParallelism
from lightning_mimo.data.balance import balanced_order
from lightning_mimo.data.loader import GlobalBatchSampler, SeededSampler, shard_dataloader
from lightning_mimo.data.rank_share import DrawnBatch, RankShare
from lightning_mimo.data.sample_costs import SampleCosts
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.layout.batch_plan import RankBatchPlan, shard

MODULES = ("images", "language")
NONE_PADDED, TEXT_PADDED = frozenset[str](), frozenset({"language"})


def lognormal(number: int, *, seed: int = 0, modules: tuple[str, ...] = MODULES) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: np.exp(0.8 * random.standard_normal(number)) for name in modules}


def work(costs: np.ndarray, order: np.ndarray, dp: int, microbatches: int = 1) -> np.ndarray:
    """Of each microbatch and replica."""
    shards = [
        [
            shard(global_batch_size=len(order), num_microbatches=microbatches, dp=dp, dp_rank=rank, microbatch=each)
            for rank in range(dp)
        ]
        for each in range(microbatches)
    ]
    return np.array([[costs[order[list(run)]].sum() for run in row] for row in shards])


def imbalance(costs: np.ndarray, order: np.ndarray, dp: int, microbatches: int = 1) -> float:
    of_replica = work(costs, order, dp, microbatches).sum(axis=0)
    return of_replica.max() / of_replica.mean()


# The order.


@pytest.mark.parametrize(("replicas", "per_replica", "limit"), [(8, 16, 1.05), (8, 8, 1.1), (32, 16, 1.1)])
def test_replicas_have_even_work_of_both_modules(replicas: int, per_replica: int, limit: float) -> None:
    found: list[float] = []
    for seed in range(8):
        costs = lognormal(replicas * per_replica, seed=seed)
        order = balanced_order(costs, dp_sizes=dict.fromkeys(MODULES, replicas), num_microbatches=1, padded=NONE_PADDED)
        assert sorted(order) == list(range(len(order)))
        found += [imbalance(each, order, replicas) for each in costs.values()]
    in_order = [
        imbalance(each, np.arange(replicas * per_replica), replicas)
        for seed in range(8)
        for each in lognormal(replicas * per_replica, seed=seed).values()
    ]
    assert np.mean(found) < limit
    assert np.mean(in_order) > 1.2


@pytest.mark.parametrize(
    "dp_sizes",
    [{"images": 8, "language": 2}, {"images": 1, "language": 4}, {"images": 2, "audio": 3, "language": 6}],
    ids=str,
)
def test_replicas_of_every_module_are_even_although_they_contain_one_another(dp_sizes: Mapping[str, int]) -> None:
    for seed in range(4):
        costs = lognormal(96, seed=seed, modules=tuple(dp_sizes))
        order = balanced_order(costs, dp_sizes=dp_sizes, num_microbatches=2, padded=NONE_PADDED)
        for name, dp in dp_sizes.items():
            assert imbalance(costs[name], order, dp, microbatches=2) < 1.15, name


def test_microbatches_are_even_where_nothing_is_padded() -> None:
    dp_sizes = {"images": 4, "language": 2}
    costs = lognormal(256)
    order = balanced_order(costs, dp_sizes=dp_sizes, num_microbatches=8, padded=NONE_PADDED)
    for name, dp in dp_sizes.items():
        found, before = (work(costs[name], each, dp, 8) for each in (order, np.arange(256)))
        assert found.std() < 0.6 * before.std(), name


def test_padding_within_microbatches_becomes_less() -> None:
    costs = lognormal(128)
    order = balanced_order(costs, dp_sizes=dict.fromkeys(MODULES, 4), num_microbatches=8, padded=TEXT_PADDED)
    lengths = costs["language"]

    def padded(order: np.ndarray) -> float:
        return (lengths[order].reshape(32, 4).max(axis=1) * 4).sum() / lengths.sum()

    assert padded(order) < 1.45 < 1.7 < padded(np.arange(128))
    assert imbalance(costs["images"], order, 4, microbatches=8) < 1.05


def test_order_does_not_depend_on_the_unit_and_is_the_same_every_time() -> None:
    costs, options = (
        lognormal(64),
        {"dp_sizes": dict.fromkeys(MODULES, 4), "num_microbatches": 2, "padded": TEXT_PADDED},
    )
    order = balanced_order(costs, **options)
    assert (balanced_order(costs, **options) == order).all()
    assert (balanced_order({name: 2.0**40 * each for name, each in costs.items()}, **options) == order).all()


@pytest.mark.parametrize("cost", [0.0, 1.0, 1e300])
def test_equal_costs_are_divided_like_any_others(cost: float) -> None:
    costs = {"images": np.full(16, cost), "language": np.zeros(16)}
    order = balanced_order(costs, dp_sizes={"images": 4, "language": 2}, num_microbatches=2, padded=TEXT_PADDED)
    assert sorted(order) == list(range(16))


# Costs of a dataset.


class Costly(Dataset):
    """Sample i has a text of 2 + i % 5 tokens, and no images."""

    def __init__(self, cost: Callable[[int], Any], size: int = 20) -> None:
        self.cost = cost
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = 2 + index % 5
        return {"input_ids": torch.full((length,), 100 + index), "labels": torch.full((length,), 7)}


def costs_of(dataset: Dataset) -> SampleCosts:
    costs = SampleCosts.of_dataset(dataset, modules=MODULES)
    assert costs is not None
    return costs


def test_costs_are_numbers_of_each_module_or_one_for_all() -> None:
    costs = costs_of(Costly(lambda index: {"images": np.float32(index)} if index % 2 else 2 * index)).of([4, 3])
    assert {name: each.tolist() for name, each in costs.items()} == {"images": [8, 3], "language": [8, 0]}


def test_subset_has_the_costs_of_its_samples() -> None:
    subset = Subset(Subset(Costly(float), [9, 8, 7]), [2, 0])
    assert costs_of(subset).of([0, 1])["language"].tolist() == [7, 9]


def test_dataset_without_costs_is_left_in_order() -> None:
    assert SampleCosts.of_dataset(Subset(torch.utils.data.TensorDataset(torch.ones(3)), [0]), modules=MODULES) is None


def failing(index: int) -> float:
    raise KeyError(index)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (lambda index: -1.0 if index == 3 else 1.0, r"Sample 3: Costly\.cost is -1 for 'images'\. A cost is a finite"),
        (lambda index: {"language": float("nan")}, r"Sample 2: Costly\.cost is nan for 'language'"),
        (
            lambda index: {"image": 1.0},
            r"Sample 2: Costly\.cost gives a cost of 'image', but the modules of the layout",
        ),
        (lambda index: "much", r"Sample 2: Costly\.cost gives 'much', a str\. Return a number, or a dict"),
        (lambda index: None, r"Sample 2: Costly\.cost gives None, a NoneType"),
        (failing, r"Sample 2: Costly\.cost raised KeyError: 2\. Correct it, or .* MimoStrategy\(balance=False\)"),
    ],
)
def test_bad_cost_is_refused_with_the_sample(cost: Callable[[int], Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        costs_of(Costly(cost)).of([2, 3])


# Global batches.


def plans(
    *, language: ModuleParallelism, images: ModuleParallelism, batch: int, microbatches: int
) -> list[RankBatchPlan]:
    world = (images.dp or 1) + (language.dp or 1)
    layout = MimoLayout.resolve({"images": images, "language": language}, world_size=world)
    return [
        RankBatchPlan.build(layout, rank, global_batch_size=batch, num_microbatches=microbatches)
        for rank in range(world)
    ]


def test_all_ranks_find_the_same_sample_at_a_position_and_every_sample_once() -> None:
    dataset = Costly(lambda index: {"images": index % 3, "language": 2 + index % 5})
    found: dict[int, dict[int, tuple[int, int, bool]]] = {0: {}, 1: {}}
    for plan in plans(images=ModuleParallelism(dp=4), language=ModuleParallelism(dp=2), batch=16, microbatches=2):
        order = SeededSampler(SequentialSampler(dataset), seed=1)
        share = RankShare(plan, costs=costs_of(dataset))
        for number, batch in enumerate(GlobalBatchSampler(order, batch_size=16, drop_last=False)):
            for request in share.requests(batch):
                entry = request.index, request.drawn, request.is_padding
                assert found[number].setdefault(request.position, entry) == entry
    for number, batch in found.items():
        assert sorted(batch) == list(range(16))
        by_number = sorted((drawn, index, is_padding) for index, drawn, is_padding in batch.values())
        # Sample 18 is the first of the cheapest ones.
        indices = list(range(16)) if number == 0 else [*range(16, 20), *[18] * 12]
        assert by_number == [(each, index, number == 1 and each >= 4) for each, index in enumerate(indices)]
    assert [found[0][position][0] for position in range(16)] != list(range(16))


def test_a_short_batch_is_filled_with_its_cheapest_sample_of_all_modules_together() -> None:
    costs = {3: (0, 10), 4: (8, 1), 5: (1, 2), 6: (1, 2)}  # of images, of language
    dataset = Costly(lambda index: dict(zip(MODULES, costs[index], strict=True)))
    (plan, *_) = plans(images=ModuleParallelism(), language=ModuleParallelism(), batch=6, microbatches=1)
    requests = RankShare(plan, costs=costs_of(dataset)).requests(DrawnBatch(rows=[(3,), (4,), (5,), (6,)], epoch=0))
    assert sorted(each.index for each in requests) == [3, 4, 5, 5, 5, 6]
    assert [each.index for each in requests if each.is_padding] == [5, 5]
    assert costs_of(Costly(lambda index: 0)).cheapest([7, 8]) == 7


def test_costs_are_asked_for_in_the_worker() -> None:
    here = os.getpid()

    def cost(index: int) -> float:
        assert os.getpid() != here
        return float(index)

    *_, plan = plans(images=ModuleParallelism(), language=ModuleParallelism(), batch=20, microbatches=1)
    expected = SampleFormat(special_token_ids={"images": 9}, pad_token_id=0, modules=("images",))
    loader = DataLoader(Costly(cost), num_workers=1, multiprocessing_context="fork")
    (batch,) = shard_dataloader(loader, plan, sample_format=expected, seed=1, balance=True)
    assert sorted(batch[0]["sample_indices"]) == list(range(20))


def test_microbatches_tell_the_position_in_the_order_of_the_sampler() -> None:
    dataset = Costly(lambda index: 2 + index % 5)
    *_, last = plans(images=ModuleParallelism(), language=ModuleParallelism(dp=2), batch=20, microbatches=2)
    expected = SampleFormat(special_token_ids={"images": 9}, pad_token_id=0, modules=("images",))
    batches = {
        balance: next(
            iter(shard_dataloader(DataLoader(dataset), last, sample_format=expected, seed=1, balance=balance))
        )
        for balance in (True, False)
    }
    for microbatch in batches[True]:
        assert microbatch["global_positions"] == microbatch["sample_indices"]
    assert batches[False][0]["global_positions"] == (5, 6, 7, 8, 9)
    assert batches[True][0]["global_positions"] != (5, 6, 7, 8, 9)

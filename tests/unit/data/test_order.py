"""The order of samples in a run that resumes is that of a run that never stopped, whatever a sampler remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import RandomSampler, Sampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_mimo.data.order import SeededSampler

SIZE = 12


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class Remembers(Sampler[int]):
    """Has a generator of numpy's of its own, as a sampler that sorts by length has."""

    def __init__(self) -> None:
        self._random = np.random.RandomState(5)

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        yield from self._random.permutation(SIZE).tolist()


class Counts(Remembers):
    """Counts its epochs itself."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        yield from np.random.RandomState(self.epoch).permutation(SIZE).tolist()


class IsTold(Remembers):
    """Is told the epoch."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from np.random.RandomState(self.epoch).permutation(SIZE).tolist()


class Saves(Counts):
    """Keeps its state itself, and cannot be drawn from twice."""

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]


SAMPLERS: dict[str, Callable[[], Any]] = {
    "default": lambda: RandomSampler(range(SIZE)),
    "generator": lambda: RandomSampler(range(SIZE), generator=generator()),
    "replacement": lambda: RandomSampler(range(SIZE), replacement=True, generator=generator()),
    "weighted": lambda: WeightedRandomSampler([1.0] * SIZE, SIZE, generator=generator()),
    "subset": lambda: SubsetRandomSampler(range(SIZE), generator=generator()),
    "random_state": Remembers,
    "counter": Counts,
    "set_epoch": IsTold,
    "state_dict": Saves,
}


def orders(sampler: SeededSampler, epochs: range) -> list[list[int]]:
    found = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


@pytest.mark.parametrize("name", SAMPLERS)
def test_order_after_a_resume_is_that_of_a_run_that_never_stopped(name: str) -> None:
    whole = orders(SeededSampler(SAMPLERS[name](), seed=1), range(4))
    assert len({tuple(order) for order in whole}) == 4, "every epoch has its own"
    stopped = SeededSampler(SAMPLERS[name](), seed=1)
    orders(stopped, range(2))
    for epoch in (1, 2):  # in the middle of an epoch, and at its end
        saved = stopped.states()
        resumed = SeededSampler(SAMPLERS[name](), seed=1, resumed=True, saved=saved)
        assert orders(resumed, range(epoch, 4)) == whole[epoch:]
        if name != "state_dict":  # which says itself where it is
            other = SeededSampler(SAMPLERS[name](), seed=1, resumed=True)
            assert orders(other, range(epoch, 4)) == whole[epoch:], "without a state in the checkpoint"


@pytest.mark.parametrize("name", SAMPLERS)
def test_iterating_again_draws_nothing(name: str) -> None:
    once, often = (SeededSampler(SAMPLERS[name](), seed=1) for _ in range(2))
    for epoch in range(3):
        once.set_epoch(epoch)
        often.set_epoch(epoch)
        next(iter(often))
        assert list(often) == list(often) == list(once)


def test_a_second_run_goes_on_with_the_users_generator() -> None:
    sampler = RandomSampler(range(SIZE), generator=generator())
    first, second = (orders(SeededSampler(sampler, seed=1), range(2)) for _ in range(2))
    assert first + second == orders(SeededSampler(SAMPLERS["generator"](), seed=1), range(4))


def test_sampler_that_cannot_be_taken_back_is_refused() -> None:
    sampler = Remembers()
    orders(SeededSampler(sampler, seed=1), range(3))
    assert orders(SeededSampler(sampler, seed=1, resumed=True), range(3, 4)), "goes on where it is"
    message = (
        r"resumes in epoch 1, but the sampler Remembers has already given the orders of 4 epochs.*set_epoch\(epoch\)"
    )
    with pytest.raises(ValueError, match=message):
        orders(SeededSampler(sampler, seed=1, resumed=True), range(1, 2))


def test_sampler_of_transformers_that_groups_by_length() -> None:
    trainer = pytest.importorskip("transformers.trainer_pt_utils")
    lengths = [1 + 7 * index % 50 for index in range(64)]

    def orders(epochs: int) -> list[list[int]]:
        order = SeededSampler(trainer.LengthGroupedSampler(8, lengths=lengths), seed=1)
        found = []
        for epoch in range(epochs):
            order.set_epoch(epoch)
            found.append(list(order))
        return found

    first, second = orders(2)
    torch.rand(3)
    assert orders(2) == [first, second]
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second
    resumed = SeededSampler(trainer.LengthGroupedSampler(8, lengths=lengths), seed=1, first_epoch=0, resumed=True)
    resumed.set_epoch(1)
    assert list(resumed) == second
    spread = [max(batch) - min(batch) for batch in (np.array(lengths)[first[i : i + 8]] for i in range(0, 64, 8))]
    assert np.mean(spread) < 0.6 * (max(lengths) - min(lengths))

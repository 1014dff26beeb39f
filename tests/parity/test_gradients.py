"""The promise, in float64: every loss, gradient, gradient norm and weight is that of one plain process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import ParityTable
from tests.parity.cases import CASES, IN_DEFAULT_RUN, Case, every_layout, random_case
from tests.parity.layouts import errors
from tests.parity.oracle import Task, Truth, truth
from tests.support.rank_pool import RankPool
from tests.support.tiers import exhaustive, with_default

# What Lightning logs is float32; all the rest is float64 from end to end.
LOGGED, EXACT = 1e-7, 1e-10

Check = Callable[[str, Case], None]


@pytest.fixture(scope="module")
def truths() -> dict[str, Truth]:
    """What the oracle found for each task so far."""
    return {}


@pytest.fixture
def check(rank_pool: RankPool, truths: dict[str, Truth], parity_table: ParityTable) -> Check:
    def expected(task: Task) -> Truth:
        if repr(task) not in truths:
            truths[repr(task)] = rank_pool.run(truth, task, world_size=1)[0]
        return truths[repr(task)]

    def run(name: str, case: Case) -> None:
        truth = expected(case.task)
        found = rank_pool.run(errors, case.task, case.layout, truth, world_size=case.layout.ranks)
        parity_table.add(name, case.layout.ranks, found)
        assert frozenset().union(*(each.parameters for each in found)) == truth.initial.keys()
        worst = max(found, key=lambda each: each.gradient)
        assert worst.gradient < EXACT, f"gradient of {worst.worst}"
        assert max(each.initial for each in found) == 0
        assert max(each.norm for each in found) < EXACT
        assert max(each.weight for each in found) < EXACT
        assert max(each.loss for each in found) < LOGGED

    return run


@pytest.mark.parity
@pytest.mark.parametrize("name", with_default(CASES, IN_DEFAULT_RUN))
def test_training_is_that_of_one_process(check: Check, name: str) -> None:
    check(name, CASES[name])


@pytest.mark.parity
@pytest.mark.parametrize("seed", [0, *map(exhaustive, range(1, 5))])
def test_random_layout_trains_as_one_process(check: Check, seed: int) -> None:
    check(f"random-seed_{seed}", random_case(seed))


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(5, 205))
def test_many_random_layouts_train_as_one_process(check: Check, seed: int) -> None:
    check(f"random-seed_{seed}", random_case(seed))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", EVERY := every_layout())
def test_every_dense_layout_trains_as_one_process(check: Check, name: str) -> None:
    check(name, EVERY[name])

"""What a benchmark says of two ways that took turns."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from tests.benchmarks.paired import Comparison, compare


def _of(ratios: Sequence[float]) -> Comparison:
    """Whose rounds have these ratios."""
    return Comparison(a=tuple(ratio for ratio in ratios for _ in range(2)), b=(1.0, 1.0) * len(ratios))


def test_blocks_take_turns() -> None:
    order = []

    def block(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    found = compare(lambda: block("a", 3.0), lambda: block("b", 2.0), rounds=2)
    assert "".join(order) == "ab" + 2 * "abba"
    assert found.ratio == 1.5
    assert found.difference == 1.0
    assert found.control == (1.0, 1.0)


@pytest.mark.parametrize(("rounds", "least"), [(1, 1), (5, 1), (6, 1), (12, 3), (20, 6), (40, 14)])
def test_interval_leaves_out_as_many_as_the_sign_test_allows(rounds: int, least: int) -> None:
    assert _of(range(1, rounds + 1)).interval == (least, rounds + 1 - least)


@pytest.mark.parametrize("rounds", [6, 12, 40])
def test_interval_holds_the_median_19_times_out_of_20(rounds: int) -> None:
    draw = random.Random(rounds)
    runs = [_of([draw.lognormvariate(0, 1) for _ in range(rounds)]).interval for _ in range(2000)]
    held = sum(low <= 1 <= high for low, high in runs) / len(runs)
    assert 0.94 < held < 0.99

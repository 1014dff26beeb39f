from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import numpy as np
import pytest

from lightning_mimo.data.balance import balanced_order
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import ModuleParallelism
from lightning_mimo.planning.candidate import Candidate, Variant
from lightning_mimo.planning.hardware import load_hardware
from lightning_mimo.planning.pricing import price_stages
from lightning_mimo.planning.samples import SampleSizes
from lightning_mimo.planning.step import simulate_step
from lightning_mimo.planning.stragglers import (
    SampleSpread,
    balanced,
    draw_factors,
    lognormal_costs,
    seconds_with,
    spread_of,
)
from tests.unit.planning.formula import Transformer, formula_model

MODEL = formula_model(
    {
        "images": Transformer(layers=24, hidden=1024, tokens=576, output=4096),
        "language": Transformer(layers=32, hidden=2048, tokens=1024, output=2048),
    },
    global_batch_size=64,
)
H100 = load_hardware("h100")


def _candidate(colocate: bool, **dp: int) -> Candidate:
    modules = {name: ModuleParallelism(dp=each) for name, each in dp.items()}
    ranks = max(dp.values()) if colocate else sum(dp.values())
    return Candidate(
        layout=MimoLayout.resolve(modules, world_size=ranks, colocate=colocate),
        num_microbatches=4,
        encoder_run_ahead=1,
        distributed_optimizer=True,
        overlap=True,
        variant=Variant(recompute=frozenset(), sequence_parallel=False),
    )


LAYOUTS = [
    _candidate(True, images=8, language=8),
    _candidate(False, images=4, language=2),
    _candidate(False, images=2, language=4),
]


@pytest.mark.parametrize("candidate", LAYOUTS, ids=str)
def test_equal_samples_change_nothing(candidate: Candidate) -> None:
    """All replicas simulated one by one give the step of one that stands for all."""
    prices = price_stages(candidate, MODEL, H100)
    same = SampleSpread(costs={"images": [3.0, 3.0], "language": [1.0, 1.0]}, order=None)
    expected = simulate_step(candidate, prices, MODEL, H100).seconds
    assert seconds_with(same, candidate, prices, MODEL, H100) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("candidate", LAYOUTS[:2], ids=str)
def test_differing_samples_cost_time_and_balance_saves_most_of_it(candidate: Candidate) -> None:
    prices = price_stages(candidate, MODEL, H100)
    spread = SampleSpread(costs=lognormal_costs({"images": 0.8, "language": 0.0}), order=None)
    equal = simulate_step(candidate, prices, MODEL, H100).seconds
    plain, even = (
        seconds_with(replace(spread, order=order), candidate, prices, MODEL, H100) for order in (None, balanced)
    )
    assert plain > equal and even < plain
    assert even - equal < 0.6 * (plain - equal)


@pytest.mark.parametrize("padded", [frozenset({"language"}), frozenset()], ids=["padded", "packed"])
def test_the_order_is_the_one_of_the_loader(padded: frozenset[str]) -> None:
    costs = lognormal_costs({"images": 0.8, "language": 1.0}, number=64)
    expected = balanced_order(
        {name: np.array(each) for name, each in costs.items()},
        dp_sizes={"images": 4, "language": 2},
        num_microbatches=4,
        padded=padded,
    )
    assert balanced(costs, LAYOUTS[1], padded=padded) == expected.tolist()
    other = frozenset({"language"}) - padded
    assert balanced(costs, LAYOUTS[1], padded=other) != expected.tolist()


def test_factors_are_means_of_the_samples_of_a_replica() -> None:
    candidate = LAYOUTS[1]
    spread = SampleSpread(costs={"images": [float(i) for i in range(100)]}, order=None)
    factors = draw_factors(spread, candidate, MODEL, random.Random(0))
    drawn = random.Random(0)
    batch = [drawn.randrange(100) for _ in range(64)]
    assert factors["images"][1][2] == pytest.approx(statistics.fmean(batch[32 + 4 : 32 + 8]) / statistics.fmean(batch))
    assert factors["language"] == [[1.0] * 4] * 2
    assert [len(factors[name]) for name in ("images", "language")] == [4, 2]


def test_padded_samples_cost_as_much_as_the_longest_of_their_microbatch() -> None:
    candidate = LAYOUTS[1]
    costs = {"images": [1.0, 2.0, 6.0], "language": [1.0, 2.0, 6.0]}
    spread = SampleSpread(costs=costs, order=None, padded=frozenset({"language"}))
    factors = draw_factors(spread, candidate, MODEL, random.Random(0))
    drawn = random.Random(0)
    batch = [costs["language"][drawn.randrange(3)] for _ in range(64)]
    mean = statistics.fmean(batch)
    assert factors["language"][1][2] == pytest.approx(max(batch[32 + 8 : 32 + 16]) / mean)
    assert factors["images"][1][2] == pytest.approx(statistics.fmean(batch[32 + 4 : 32 + 8]) / mean)
    prices = price_stages(candidate, MODEL, H100)
    packed = replace(spread, padded=frozenset())
    padded, even = (seconds_with(each, candidate, prices, MODEL, H100) for each in (spread, packed))
    assert padded > 1.5 * even


def sizes(tokens: list[int], images: list[int]) -> SampleSizes:
    return SampleSizes(number=len(tokens), tokens=tokens, placeholders={"images": images}, largest=1)


def test_samples_of_a_dataset_are_priced_by_their_largest_one() -> None:
    """Every sample costs a share of the largest one."""
    spread = spread_of(sizes([100, 400, 100], [0, 10, 20]), padded=frozenset())
    assert spread is not None
    assert spread.share("language") == pytest.approx(0.5) and spread.share("images") == pytest.approx(1.0)
    candidate = LAYOUTS[1]
    factors = draw_factors(replace(spread, order=None), candidate, MODEL, random.Random(0))
    drawn = random.Random(0)
    batch = [drawn.randrange(3) for _ in range(64)]
    language = statistics.fmean([0.25, 1.0, 0.25][i] for i in batch[32 + 8 : 32 + 16])
    assert factors["language"][1][2] == pytest.approx(language)
    assert factors["images"][1][2] == pytest.approx(
        statistics.fmean([0.0, 1.0, 2.0][i] for i in batch[32 + 4 : 32 + 8])
    )


def test_equal_samples_have_no_spread_and_a_module_without_items_is_not_divided_by() -> None:
    assert spread_of(sizes([100, 100], [5, 5]), padded=frozenset()) is None
    spread = spread_of(sizes([100, 400], [5, 0]), padded=frozenset({"language"}))
    assert spread is not None and spread.share("images") == 1.0
    prices = price_stages(LAYOUTS[0], MODEL, H100)
    assert 0 < seconds_with(spread, LAYOUTS[0], prices, MODEL, H100) < math.inf


def test_padding_makes_a_step_as_long_as_its_largest_samples() -> None:
    """Of samples of which one in four is long, all microbatches have some, so padding costs as much as only those."""
    prices = price_stages(LAYOUTS[1], MODEL, H100)
    of_largest = simulate_step(LAYOUTS[1], prices, MODEL, H100).seconds
    times = {}
    for padded in (frozenset({"language"}), frozenset[str]()):
        spread = spread_of(sizes([100, 400, 100, 100], [0, 10, 0, 0]), padded=padded)
        assert spread is not None
        times[bool(padded)] = seconds_with(replace(spread, order=None), LAYOUTS[1], prices, MODEL, H100)
    assert times[False] < 0.6 * times[True] < 0.7 * of_largest


def test_lognormal_costs() -> None:
    costs = lognormal_costs({"images": 0.8, "language": 0.0})
    assert statistics.fmean(costs["images"]) == pytest.approx(1) and set(costs["language"]) == {1.0}
    assert statistics.pstdev(costs["images"]) == pytest.approx((2.718281828 ** (0.8**2) - 1) ** 0.5, rel=0.15)

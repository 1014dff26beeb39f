from __future__ import annotations

import itertools

import pytest

from lightning_mimo.errors import LayoutError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import ModuleParallelism
from lightning_mimo.planning.layouts import Degrees, divisors, legal_layouts, microbatch_numbers, worlds_that_fit

DEGREES = {"images": Degrees(tp=(1, 2)), "language": Degrees(tp=(1, 2), pp=(1, 2, 4))}


def _shapes(layout: MimoLayout) -> tuple[object, ...]:
    return (layout.colocated, *(sizes.shape for sizes in layout.modules.values()))


@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
def test_all_layouts_are_found(ranks: int) -> None:
    """Held against trying everything: each combination of sizes that resolve() accepts and the batch divides over."""
    expected = set()
    for tps in itertools.product((1, 2), (1, 2)):
        for pp, dps in itertools.product((1, 2, 4), itertools.product(divisors(8), repeat=2)):
            for colocate in (False, True):
                modules = {
                    "images": ModuleParallelism(tp=tps[0], dp=dps[0]),
                    "language": ModuleParallelism(tp=tps[1], pp=pp, dp=dps[1]),
                }
                try:
                    expected.add(_shapes(MimoLayout.resolve(modules, world_size=ranks, colocate=colocate)))
                except LayoutError:
                    continue
    found = [_shapes(layout) for layout in legal_layouts(DEGREES, world_size=ranks, global_batch_size=8)]
    assert set(found) == expected and len(found) == len(expected)


def test_a_language_module_alone() -> None:
    degrees = {"language": Degrees(tp=(1, 2), pp=(1, 2))}
    layouts = list(legal_layouts(degrees, world_size=4, global_batch_size=4))
    assert sorted(layout.modules["language"].shape for layout in layouts) == [
        (1, 1, 2, 2),
        (1, 1, 4, 1),
        (2, 1, 1, 2),
        (2, 1, 2, 1),
    ]


def test_experts_need_replicas() -> None:
    degrees = {"language": Degrees(tp=(1,), ep=(1, 4))}
    found = {layout.modules["language"].ep for layout in legal_layouts(degrees, world_size=2, global_batch_size=8)}
    assert found == {1}


def test_numbers_of_microbatches() -> None:
    layout = MimoLayout.resolve(
        {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(dp=4)}, world_size=6, colocate=False
    )
    assert microbatch_numbers(layout, global_batch_size=24) == [1, 2, 3, 6]


def test_the_nearest_numbers_of_ranks() -> None:
    degrees = {"images": Degrees(tp=(1,)), "language": Degrees(tp=(4,))}
    assert worlds_that_fit(degrees, world_size=11, global_batch_size=8) == [10, 12]

"""Layouts: what is filled in, what is refused, that the remedy in a refusal works, and who takes which samples."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_mimo.errors import LayoutError
from lightning_mimo.layout.batch_plan import shard
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE, ModuleParallelism, fitting_trainer

# On a machine with other work an example may take its time.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def resolve(modules: dict[str, ModuleParallelism], world_size: int, *, colocate: bool = False) -> MimoLayout:
    return MimoLayout.resolve(modules, world_size=world_size, colocate=colocate)


def placed(layout: MimoLayout) -> dict[str, tuple[int, range]]:
    return {name: (sizes.dp, sizes.ranks) for name, sizes in layout.modules.items()}


def test_modules_are_placed_one_after_another_in_the_order_written():
    layout = resolve(
        {
            "language": ModuleParallelism(tp=2, dp=1),
            "images": ModuleParallelism(dp=2),
            "audio": ModuleParallelism(dp=1),
        },
        5,
    )
    assert placed(layout) == {"language": (1, range(2)), "images": (2, range(2, 4)), "audio": (1, range(4, 5))}
    assert not layout.colocated
    assert layout.encoders == ("images", "audio")


@pytest.mark.parametrize(
    ("modules", "world_size", "dp"),
    [
        pytest.param({"language": ModuleParallelism(tp=2)}, 6, {"language": 3}, id="alone"),
        pytest.param(
            {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)},
            6,
            {"images": 2, "language": 2},
            id="left-over",
        ),
        pytest.param(
            {"images": ModuleParallelism(), "language": ModuleParallelism(tp=2, pp=2, dp=1)},
            6,
            {"images": 2, "language": 1},
            id="images",
        ),
        pytest.param(
            {"images": ModuleParallelism(), "language": ModuleParallelism(tp=2)},
            3,
            {"images": 1, "language": 1},
            id="smallest",
        ),
        pytest.param(
            {"images": ModuleParallelism(), "language": ModuleParallelism(ep=2)},
            3,
            {"images": 1, "language": 2},
            id="smallest-experts",
        ),
    ],
)
def test_missing_dp_takes_the_ranks_left_over(modules, world_size, dp):
    assert {name: sizes.dp for name, sizes in resolve(modules, world_size).modules.items()} == dp


def test_colocate_puts_every_module_on_all_ranks():
    layout = resolve(
        {"images": ModuleParallelism(), "language": ModuleParallelism(tp=2), "audio": ModuleParallelism(tp=4, dp=1)},
        4,
        colocate=True,
    )
    assert placed(layout) == {"images": (4, range(4)), "language": (2, range(4)), "audio": (1, range(4))}
    assert layout.colocated
    assert layout.modules_on(3) == ("images", "language", "audio")


def test_identical_offsets_colocate_too():
    layout = resolve(
        {"images": ModuleParallelism(dp=2, rank_offset=0), "language": ModuleParallelism(tp=2, dp=1, rank_offset=0)}, 2
    )
    assert layout.colocated


def test_explicit_offsets_override_the_order():
    layout = resolve(
        {"images": ModuleParallelism(dp=2, rank_offset=2), "language": ModuleParallelism(tp=2, dp=1, rank_offset=0)}, 4
    )
    assert placed(layout) == {"images": (2, range(2, 4)), "language": (1, range(2))}
    assert [layout.modules_on(rank) for rank in range(4)] == [("language",)] * 2 + [("images",)] * 2


def test_loss_is_computed_on_the_last_stage_and_counted_once_for_each_replica():
    layout = resolve({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2, dp=3, pp=2)}, 13)
    assert [rank for rank in range(13) if layout.is_last_stage(rank)] == [7, 8, 9, 10, 11, 12]
    assert [rank for rank in range(13) if layout.counts_loss(rank)] == [7, 9, 11]
    colocated = resolve({"images": ModuleParallelism(dp=4), "language": ModuleParallelism(tp=2)}, 4, colocate=True)
    assert [rank for rank in range(4) if colocated.is_last_stage(rank)] == [0, 1, 2, 3]
    assert [rank for rank in range(4) if colocated.counts_loss(rank)] == [0, 2]


def test_coordinates_run_tp_fastest_then_dp_then_pp():
    sizes = resolve({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2, dp=3, pp=2)}, 13).modules[
        "language"
    ]
    order = [(p["pp"], p["dp"], p["cp"], p["tp"]) for p in map(sizes.coordinates, sizes.ranks)]
    assert order == [(pp, dp, 0, tp) for pp in range(2) for dp in range(3) for tp in range(2)]


def test_coordinates_put_cp_between_tp_and_dp():
    # No layout resolves with cp > 1 yet, but the order is pinned.
    sizes = ModuleParallelism(tp=2, cp=2, dp=2, rank_offset=0).resolved()
    order = [(p["dp"], p["cp"], p["tp"]) for p in map(sizes.coordinates, sizes.ranks)]
    assert order == [(dp, cp, tp) for dp in range(2) for cp in range(2) for tp in range(2)]


def test_dp_left_out_everywhere_is_filled_in_where_only_one_way_fits():
    modules = {"images": ModuleParallelism(), "language": ModuleParallelism(tp=2)}
    apart, together = resolve(modules, 4), resolve(modules, 4, colocate=True)
    assert {name: sizes.dp for name, sizes in apart.modules.items()} == {"images": 2, "language": 1}
    assert {name: sizes.dp for name, sizes in together.modules.items()} == {"images": 4, "language": 2}


def test_expert_sizes_fill_a_stage():
    modules = {"images": ModuleParallelism(dp=4), "language": ModuleParallelism(tp=2, dp=4, pp=2, ep=2, expt_tp=1)}
    sizes = resolve(modules, 20).modules["language"]
    assert sizes.shape == (2, 1, 4, 2)
    assert sizes.expert_shape == (1, 2, 4, 2)
    assert sizes.expt_dp == 4


def test_resolved_modules_cannot_be_changed():
    layout = resolve({"language": ModuleParallelism()}, 1)
    with pytest.raises(TypeError, match="does not support item assignment"):
        layout.modules["images"] = ModuleParallelism()


@pytest.mark.parametrize(
    ("world_size", "text"),
    [
        (1, "devices=1"),
        (8, "devices=8, or devices=4 with num_nodes=2"),
        (16, "devices=16, or devices=8 with num_nodes=2"),
    ],
)
def test_fitting_trainer_offers_nodes(world_size, text):
    assert fitting_trainer(world_size) == text


@dataclass(frozen=True)
class Refusal:
    """A layout that is refused, what the message says, and what the user then writes."""

    modules: dict[Any, Any]
    world_size: int
    says: tuple[str, ...]
    remedies: tuple[tuple[dict[str, ModuleParallelism], int, bool], ...]
    colocate: bool = False


TWO_ALONE = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}

REFUSALS = {
    "no-language": Refusal(
        {"images": ModuleParallelism(), "text": ModuleParallelism()},
        2,
        ("No module is called 'language'", "has 'images', 'text'", "Call the module that computes the loss 'language'"),
        (({"images": ModuleParallelism(), "language": ModuleParallelism()}, 2, False),),
    ),
    "no-modules": Refusal(
        {},
        1,
        ("No module is called 'language'; the layout has no modules.",),
        (({"language": ModuleParallelism()}, 1, False),),
    ),
    "name-with-dash": Refusal(
        {"my-images": ModuleParallelism(), "language": ModuleParallelism()},
        2,
        ("Module name 'my-images' is not usable", "a Python identifier such as 'images'"),
        (({"images": ModuleParallelism(), "language": ModuleParallelism()}, 2, False),),
    ),
    "name-not-a-string": Refusal(
        {3: ModuleParallelism(), "language": ModuleParallelism()},
        2,
        ("Module name 3 is not usable", "must be a Python identifier"),
        (({"images": ModuleParallelism(), "language": ModuleParallelism()}, 2, False),),
    ),
    "sizes-as-dict": Refusal(
        {"language": {"tp": 2}},
        2,
        ("Module 'language' is described by a dict; write ModuleParallelism(tp=..., dp=...).",),
        (({"language": ModuleParallelism(tp=2)}, 2, False),),
    ),
    "tp-zero": Refusal(
        {"language": ModuleParallelism(tp=0)},
        2,
        ("Module 'language': tp=0 must be a whole number of at least 1.",),
        (({"language": ModuleParallelism(tp=1)}, 2, False),),
    ),
    "pp-is-a-bool": Refusal(
        {"language": ModuleParallelism(pp=True)},
        2,
        ("Module 'language': pp=True must be a whole number of at least 1.",),
        (({"language": ModuleParallelism(pp=1)}, 2, False),),
    ),
    "dp-negative": Refusal(
        {"language": ModuleParallelism(dp=-1)},
        2,
        ("Module 'language': dp=-1 must be a whole number of at least 1.",),
        (({"language": ModuleParallelism(dp=2)}, 2, False),),
    ),
    "ep-is-a-float": Refusal(
        {"language": ModuleParallelism(ep=2.0)},
        2,
        ("Module 'language': ep=2.0 must be a whole number of at least 1.",),
        (({"language": ModuleParallelism(ep=2)}, 2, False),),
    ),
    "tp-is-none": Refusal(
        {"language": ModuleParallelism(tp=None)},
        2,
        ("Module 'language': tp=None must be a whole number of at least 1.",),
        (({"language": ModuleParallelism(tp=2)}, 2, False),),
    ),
    "offset-negative": Refusal(
        {"language": ModuleParallelism(rank_offset=-1)},
        2,
        ("Module 'language': rank_offset=-1 must be a whole number of at least 0.",),
        (({"language": ModuleParallelism(rank_offset=0)}, 2, False),),
    ),
    "cp": Refusal(
        {"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2, cp=2)},
        5,
        ("Module 'language': cp=2 is not supported", "cannot split a sequence", "Set cp=1 and tp=4"),
        (({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=4)}, 5, False),),
    ),
    "dp-does-not-come-out": Refusal(
        {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)},
        5,
        ("Module 'language': 5 ranks - (images 2) leaves 3", "multiple of tp=2 = 2 ranks per replica", "devices=4"),
        ((TWO_ALONE, 4, False),),
    ),
    "nothing-left-for-dp": Refusal(
        {
            "images": ModuleParallelism(dp=8),
            "audio": ModuleParallelism(dp=4),
            "language": ModuleParallelism(tp=2, pp=2),
        },
        8,
        (
            "Module 'language': 8 ranks - (images 8 + audio 4) leaves -4, which is not a positive multiple of "
            "tp=2 * pp=2 = 4 ranks per replica",
            "devices=16, or devices=8 with num_nodes=2",
        ),
        (
            (
                {
                    "images": ModuleParallelism(dp=8),
                    "audio": ModuleParallelism(dp=4),
                    "language": ModuleParallelism(tp=2, pp=2),
                },
                16,
                False,
            ),
        ),
    ),
    "nothing-left-for-experts": Refusal(
        {"images": ModuleParallelism(dp=1), "language": ModuleParallelism(ep=4)},
        1,
        ("Module 'language': 1 ranks - (images 1) leaves 0", "smallest run that fits is devices=5."),
        (({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(ep=4)}, 5, False),),
    ),
    "alone-dp-does-not-come-out": Refusal(
        {"language": ModuleParallelism(tp=2)},
        3,
        ("Module 'language': 3 ranks - (0) leaves 3", "The smallest run that fits is devices=2."),
        (({"language": ModuleParallelism(tp=2)}, 2, False),),
    ),
    "dp-ambiguous": Refusal(
        {"images": ModuleParallelism(), "language": ModuleParallelism(tp=2)},
        6,
        (
            "dp is left out for 'images' and 'language'",
            "how 6 ranks are to be divided",
            "Give dp for all of these except one. Possible: images dp=2, language dp=2; images dp=4, language dp=1.",
        ),
        (
            ({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}, 6, False),
            ({"images": ModuleParallelism(), "language": ModuleParallelism(tp=2, dp=1)}, 6, False),
        ),
    ),
    "dp-open-and-no-way-to-take-all-ranks": Refusal(
        {"images": ModuleParallelism(tp=2), "language": ModuleParallelism(tp=2)},
        5,
        ("dp is left out for 'images' and 'language', and no choice takes all 5 ranks", "devices=4"),
        (({"images": ModuleParallelism(tp=2), "language": ModuleParallelism(tp=2)}, 4, False),),
    ),
    "dp-open-and-too-few-ranks": Refusal(
        {"images": ModuleParallelism(tp=2), "language": ModuleParallelism(tp=2)},
        3,
        ("left out for 'images' and 'language'", "images 2 + language 2 = 4 ranks, but there are 3", "devices=4"),
        (({"images": ModuleParallelism(tp=2), "language": ModuleParallelism(tp=2)}, 4, False),),
    ),
    "one-rank-idle": Refusal(
        {"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2, dp=1)},
        4,
        (
            "Rank 3 belongs to no module (images tp=1 * dp=1 on ranks 0, language tp=2 * dp=1 on ranks 1-2)",
            "run with devices=3, or make a module larger",
        ),
        (
            ({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2, dp=1)}, 3, False),
            ({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2, dp=1)}, 4, False),
        ),
    ),
    "node-idle": Refusal(
        {"images": ModuleParallelism(dp=8), "language": ModuleParallelism(tp=8, dp=1)},
        24,
        ("Ranks 16-23 belong to no module", "run with devices=16, or devices=8 with num_nodes=2"),
        (({"images": ModuleParallelism(dp=8), "language": ModuleParallelism(tp=8, dp=1)}, 16, False),),
    ),
    "gap": Refusal(
        {"images": ModuleParallelism(dp=1, rank_offset=0), "language": ModuleParallelism(dp=1, rank_offset=3)},
        4,
        ("Ranks 1, 2 belong to no module", "close the gap between the rank_offsets", "leave them out", "devices=2"),
        (
            (
                {"images": ModuleParallelism(dp=1, rank_offset=0), "language": ModuleParallelism(dp=1, rank_offset=1)},
                2,
                False,
            ),
            ({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1)}, 2, False),
        ),
    ),
    "gap-beyond-the-last-rank": Refusal(
        {"images": ModuleParallelism(dp=1, rank_offset=0), "language": ModuleParallelism(dp=1, rank_offset=3)},
        2,
        ("Ranks 1, 2 belong to no module", "leave them out and run with devices=2"),
        (({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1)}, 2, False),),
    ),
    "too-many-ranks-needed": Refusal(
        {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2, pp=2, dp=1)},
        4,
        (
            "The layout needs 6 ranks (images tp=1 * dp=2 on ranks 0-1, language tp=2 * pp=2 * dp=1 on ranks 2-5), "
            "but there are 4",
            "Run with devices=6, or devices=2 with num_nodes=3, or make a module smaller",
        ),
        (
            ({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2, pp=2, dp=1)}, 6, False),
            ({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2, dp=1)}, 4, False),
        ),
    ),
    "partial-overlap": Refusal(
        {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(dp=2, rank_offset=1)},
        3,
        (
            "Modules 'images' (ranks 0-1) and 'language' (ranks 1-2) share some ranks but not all",
            "identical (colocate=True) or disjoint (leave rank_offset out)",
        ),
        (
            ({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(dp=2)}, 2, True),
            ({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(dp=2)}, 4, False),
        ),
    ),
    "contained": Refusal(
        {"images": ModuleParallelism(dp=2, rank_offset=0), "language": ModuleParallelism(dp=1, rank_offset=0)},
        2,
        ("Modules 'images' (ranks 0-1) and 'language' (ranks 0) share some ranks but not all",),
        (({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}, 2, True),),
    ),
    "mixed": Refusal(
        {
            "images": ModuleParallelism(dp=2, rank_offset=0),
            "audio": ModuleParallelism(dp=2, rank_offset=0),
            "language": ModuleParallelism(dp=2, rank_offset=2),
        },
        4,
        (
            "Some modules share their ranks and others do not (images tp=1 * dp=2 on ranks 0-1, audio",
            "put all modules on all ranks (colocate=True), or each on ranks of its own (leave rank_offset out)",
        ),
        (
            ({"images": ModuleParallelism(), "audio": ModuleParallelism(), "language": ModuleParallelism()}, 4, True),
            (
                {
                    "images": ModuleParallelism(dp=2),
                    "audio": ModuleParallelism(dp=2),
                    "language": ModuleParallelism(dp=2),
                },
                6,
                False,
            ),
        ),
    ),
    "dp-sizes-do-not-divide": Refusal(
        {"images": ModuleParallelism(dp=3), "language": ModuleParallelism(tp=2, dp=2)},
        7,
        (
            "Modules 'images' (dp=3) and 'language' (dp=2): one dp must be a multiple of the other",
            "Change 'images' to dp=2 (devices=6, or devices=2 with num_nodes=3); or 'images' to dp=1 (devices=5); or "
            "'language' to dp=3 (devices=9).",
        ),
        (
            ({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2, dp=2)}, 6, False),
            ({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2, dp=2)}, 5, False),
            ({"images": ModuleParallelism(dp=3), "language": ModuleParallelism(tp=2, dp=3)}, 9, False),
        ),
    ),
    "dp-sizes-do-not-divide-beside-another-encoder": Refusal(
        {"audio": ModuleParallelism(dp=2), "images": ModuleParallelism(dp=6), "language": ModuleParallelism(dp=4)},
        12,
        (
            "Modules 'images' (dp=6) and 'language' (dp=4)",
            "'images' to dp=2 (devices=8, or devices=4 with num_nodes=2); or 'language' to dp=6 (devices=14",
        ),
        (
            (
                {
                    "audio": ModuleParallelism(dp=2),
                    "images": ModuleParallelism(dp=4),
                    "language": ModuleParallelism(dp=4),
                },
                10,
                False,
            ),
            (
                {
                    "audio": ModuleParallelism(dp=2),
                    "images": ModuleParallelism(dp=2),
                    "language": ModuleParallelism(dp=4),
                },
                8,
                False,
            ),
            (
                {
                    "audio": ModuleParallelism(dp=2),
                    "images": ModuleParallelism(dp=6),
                    "language": ModuleParallelism(dp=6),
                },
                14,
                False,
            ),
        ),
    ),
    "colocated-dp-sizes-do-not-divide": Refusal(
        {"images": ModuleParallelism(tp=2), "language": ModuleParallelism(tp=3)},
        6,
        (
            "Modules 'images' (dp=3) and 'language' (dp=2)",
            "Change 'images' to dp=2, tp=3; or 'language' to dp=3, tp=2.",
        ),
        (
            ({"images": ModuleParallelism(tp=3, dp=2), "language": ModuleParallelism(tp=3)}, 6, True),
            ({"images": ModuleParallelism(tp=2), "language": ModuleParallelism(tp=2, dp=3)}, 6, True),
        ),
        colocate=True,
    ),
    "colocated-pipeline": Refusal(
        {"images": ModuleParallelism(), "language": ModuleParallelism(tp=2, pp=2)},
        4,
        ("Module 'language': pp=2 does not work where modules share all ranks", "Set pp=1 and tp=4"),
        (
            ({"images": ModuleParallelism(), "language": ModuleParallelism(tp=4)}, 4, True),
            ({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2, pp=2)}, 6, False),
        ),
        colocate=True,
    ),
    "colocated-pipeline-that-does-not-fit-either": Refusal(
        {"images": ModuleParallelism(), "language": ModuleParallelism(pp=2)},
        3,
        ("Module 'language': pp=2 does not work where modules share all ranks",),
        (({"images": ModuleParallelism(), "language": ModuleParallelism(tp=2)}, 4, True),),
        colocate=True,
    ),
    "colocated-by-offset-pipeline": Refusal(
        {"images": ModuleParallelism(dp=2, rank_offset=0), "language": ModuleParallelism(pp=2, dp=1, rank_offset=0)},
        2,
        ("Module 'language': pp=2 does not work where modules share all ranks", "Set pp=1 and tp=2"),
        (
            (
                {
                    "images": ModuleParallelism(dp=2, rank_offset=0),
                    "language": ModuleParallelism(tp=2, dp=1, rank_offset=0),
                },
                2,
                False,
            ),
        ),
    ),
    "colocated-offset": Refusal(
        {"images": ModuleParallelism(), "language": ModuleParallelism(rank_offset=2)},
        4,
        ("Module 'language' has rank_offset=2", "Leave rank_offset out, or leave colocate out"),
        (
            ({"images": ModuleParallelism(), "language": ModuleParallelism()}, 4, True),
            ({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(rank_offset=2)}, 4, False),
        ),
        colocate=True,
    ),
    "colocated-replica-does-not-divide": Refusal(
        {"images": ModuleParallelism(), "language": ModuleParallelism(tp=2)},
        5,
        (
            "Module 'language': tp=2 = 2 ranks per replica do not divide the 5 ranks",
            "Choose a tp that divides 5",
            "run with 4 or 6 ranks (devices * num_nodes)",
        ),
        (
            ({"images": ModuleParallelism(), "language": ModuleParallelism(tp=5)}, 5, True),
            ({"images": ModuleParallelism(), "language": ModuleParallelism(tp=2)}, 4, True),
            ({"images": ModuleParallelism(), "language": ModuleParallelism(tp=2)}, 6, True),
        ),
        colocate=True,
    ),
    "colocated-replicas-of-two-modules-do-not-divide": Refusal(
        {"images": ModuleParallelism(tp=2), "language": ModuleParallelism(tp=4)},
        6,
        (
            "Module 'language': tp=4 = 4 ranks per replica do not divide the 6 ranks",
            "run with 4 or 8 ranks (devices * num_nodes)",
        ),
        (
            ({"images": ModuleParallelism(tp=2), "language": ModuleParallelism(tp=4)}, 4, True),
            ({"images": ModuleParallelism(tp=2), "language": ModuleParallelism(tp=4)}, 8, True),
        ),
        colocate=True,
    ),
    "colocated-dp-does-not-fill": Refusal(
        {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)},
        4,
        (
            "Module 'images': tp=1 * dp=2 = 2 ranks, but colocate=True puts it on all 4",
            "Set dp=4, or leave dp out so that it fills the ranks, or run with devices=2.",
        ),
        (
            ({"images": ModuleParallelism(dp=4), "language": ModuleParallelism(tp=2)}, 4, True),
            ({"images": ModuleParallelism(), "language": ModuleParallelism(tp=2)}, 4, True),
            ({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}, 2, True),
        ),
        colocate=True,
    ),
    "experts": Refusal(
        {"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2, dp=1, ep=4)},
        3,
        (
            "Module 'language': tp * dp = 2 * 1 = 2 ranks per stage is not a multiple of expt_tp * ep = 1 * 4 = 4",
            "Choose expt_tp and ep whose product divides 2, or change 'language' to dp=2 (devices=5)",
        ),
        (
            ({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2, dp=1, ep=2)}, 3, False),
            ({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2, dp=2, ep=4)}, 5, False),
        ),
    ),
    "encoder-experts": Refusal(
        {"images": ModuleParallelism(dp=3, expt_tp=2), "language": ModuleParallelism(dp=3)},
        6,
        (
            "Module 'images': tp * dp = 1 * 3 = 3 ranks per stage is not a multiple of expt_tp * ep = 2 * 1 = 2",
            "change 'images' to dp=6 (devices=9)",
        ),
        (({"images": ModuleParallelism(dp=6, expt_tp=2), "language": ModuleParallelism(dp=3)}, 9, False),),
    ),
    "colocated-experts": Refusal(
        {"images": ModuleParallelism(), "language": ModuleParallelism(tp=2, ep=4)},
        6,
        ("Module 'language': tp * dp = 2 * 3 = 6 ranks per stage", "Choose expt_tp and ep whose product divides 6."),
        (({"images": ModuleParallelism(), "language": ModuleParallelism(tp=2, ep=3)}, 6, True),),
        colocate=True,
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_refusal_names_module_arithmetic_and_remedy(refusal: Refusal):
    in_order = r"[\s\S]*".join(map(re.escape, refusal.says))
    with pytest.raises(LayoutError, match=in_order):
        resolve(refusal.modules, refusal.world_size, colocate=refusal.colocate)


@pytest.mark.parametrize(
    ("modules", "world_size", "colocate"),
    [
        pytest.param(*remedy, id=f"{name}-{i}")
        for name, refusal in REFUSALS.items()
        for i, remedy in enumerate(refusal.remedies)
    ],
)
def test_remedy_of_a_refusal_resolves(modules, world_size, colocate):
    resolve(modules, world_size, colocate=colocate)


def test_layout_error_is_a_value_error():
    with pytest.raises(ValueError, match="needs 2 ranks"):
        resolve({"language": ModuleParallelism(tp=2, dp=1)}, 1)


sizes_of_anything = st.builds(
    ModuleParallelism,
    tp=st.integers(1, 3),
    pp=st.integers(1, 2),
    dp=st.none() | st.integers(1, 6),
    ep=st.integers(1, 2),
)


@st.composite
def resolved_layouts(draw: st.DrawFn) -> MimoLayout:
    """A layout that resolves: dp sizes that divide the language module's or are multiples of it."""
    language_dp = draw(st.integers(1, 6))
    nesting = st.sampled_from([dp for dp in range(1, 13) if language_dp % dp == 0 or dp % language_dp == 0])
    encoders = ["images", "audio"][: draw(st.integers(0, 2))]
    dp = {name: draw(nesting) for name in encoders} | {LANGUAGE: language_dp}
    if draw(st.booleans()):
        world_size = draw(st.sampled_from([1, 2])) * _common_multiple(dp.values())
        modules = {name: ModuleParallelism(tp=world_size // each, dp=each) for name, each in dp.items()}
        return resolve(modules, world_size, colocate=True)
    modules = {
        name: ModuleParallelism(tp=draw(st.integers(1, 2)), pp=draw(st.integers(1, 2)), dp=each)
        for name, each in dp.items()
    }
    names = draw(st.permutations(list(modules)))
    return resolve({name: modules[name] for name in names}, sum(sizes.size for sizes in modules.values()))


def _common_multiple(numbers) -> int:
    return next(n for n in range(1, 10_000) if all(n % number == 0 for number in numbers))


def _shards(layout: MimoLayout, module: str, global_batch_size: int, num_microbatches: int) -> list[list[range]]:
    """Positions by microbatch and data-parallel replica, as the ranks of the replicas see them."""
    sizes = layout.modules[module]
    replicas = {}
    for rank in sizes.ranks:
        dp_rank = sizes.coordinates(rank)["dp"]
        replicas[dp_rank] = [
            shard(
                global_batch_size=global_batch_size,
                num_microbatches=num_microbatches,
                dp=sizes.dp,
                dp_rank=dp_rank,
                microbatch=microbatch,
            )
            for microbatch in range(num_microbatches)
        ]
    return [[replicas[d][microbatch] for d in range(sizes.dp)] for microbatch in range(num_microbatches)]


@unhurried
@given(layout=resolved_layouts(), num_microbatches=st.integers(1, 3), multiple=st.integers(1, 3))
def test_every_module_takes_every_sample_once_and_in_order(layout, num_microbatches, multiple):
    unit = num_microbatches * _common_multiple([sizes.dp for sizes in layout.modules.values()])
    for module in layout.modules:
        shards = _shards(layout, module, unit * multiple, num_microbatches)
        assert list(chain(*chain(*shards))) == list(range(unit * multiple))


@unhurried
@given(layout=resolved_layouts(), num_microbatches=st.integers(1, 3), multiple=st.integers(1, 3))
def test_shards_of_encoders_nest_with_those_of_the_language_module(layout, num_microbatches, multiple):
    """Bridges concatenate several replicas' samples for one, or split one's between several, in replica order."""
    unit = num_microbatches * _common_multiple([sizes.dp for sizes in layout.modules.values()])
    language = _shards(layout, LANGUAGE, unit * multiple, num_microbatches)
    for encoder in layout.encoders:
        for ours, theirs in zip(_shards(layout, encoder, unit * multiple, num_microbatches), language, strict=True):
            many, few = (ours, theirs) if len(ours) >= len(theirs) else (theirs, ours)
            scale = len(many) // len(few)
            for i, whole in enumerate(few):
                assert list(chain(*many[i * scale : (i + 1) * scale])) == list(whole)


@unhurried
@given(
    modules=st.dictionaries(st.sampled_from(["images", "audio", LANGUAGE]), sizes_of_anything),
    world_size=st.integers(1, 16),
    colocate=st.booleans(),
)
def test_whatever_is_written_is_refused_with_a_remedy_or_covers_every_rank(modules, world_size, colocate):
    try:
        layout = resolve(modules, world_size, colocate=colocate)
    except LayoutError as error:
        assert re.search(r"devices\b|Give dp|Set |Change |Choose |Call ", str(error))
        return
    for rank in range(world_size):
        assert len(layout.modules_on(rank)) == (len(modules) if layout.colocated else 1)
    for name, sizes in layout.modules.items():
        assert sizes.size == sizes.tp * sizes.dp * sizes.pp
        assert sizes.expt_dp * sizes.expt_tp * sizes.ep == sizes.tp * sizes.dp
        one, two = sizes.dp, layout.modules[LANGUAGE].dp
        assert one % two == 0 or two % one == 0, name

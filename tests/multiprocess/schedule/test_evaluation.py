"""What is logged, validated and answered in float32 is what one plain process finds, in any layout."""

from __future__ import annotations

import pytest

from lightning_mimo import ModuleParallelism
from tests.support.evaluation import History, Run, train_in_layout, train_plainly
from tests.support.rank_pool import RankPool
from tests.support.tiers import with_default

RUN = Run()

# name -> (modules, colocate, num_microbatches, ranks)
LAYOUTS = {
    "images_dp2-language_tp2": ({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}, False, 2, 4),
    "images_pp2-language_dp2": ({"images": ModuleParallelism(pp=2), "language": ModuleParallelism(dp=2)}, False, 2, 4),
    "images_dp4-language_tp2pp2": (
        {"images": ModuleParallelism(dp=4), "language": ModuleParallelism(tp=2, pp=2)},
        False,
        3,
        8,
    ),
    "colocated-one_rank": ({"images": ModuleParallelism(), "language": ModuleParallelism()}, True, 2, 1),
    "colocated-images_dp4-language_tp2dp2": (
        {"images": ModuleParallelism(dp=4), "language": ModuleParallelism(tp=2)},
        True,
        3,
        4,
    ),
}
IN_DEFAULT_RUN = ("images_pp2-language_dp2", "colocated-one_rank")


@pytest.fixture(scope="module")
def plain(rank_pool: RankPool) -> History:
    return rank_pool.run(train_plainly, RUN, world_size=1)[0]


def assert_same(found: list[History], expected: History) -> None:
    """Every rank reports the same numbers, and they are those of the oracle to 1e-5."""
    for history in found:
        assert history == found[0], "ranks report different numbers"
    assert found[0].loss == pytest.approx(expected.loss, rel=1e-5)
    assert found[0].grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert found[0].module_grad_norms == pytest.approx(expected.module_grad_norms, rel=1e-5)
    assert found[0].val_loss == pytest.approx(expected.val_loss, rel=1e-5)
    assert found[0].val_exact_match == pytest.approx(expected.val_exact_match)


@pytest.mark.parametrize("name", with_default(LAYOUTS, IN_DEFAULT_RUN))
def test_layout_trains_as_one_process(rank_pool: RankPool, plain: History, name: str) -> None:
    modules, colocate, num_microbatches, ranks = LAYOUTS[name]
    found = rank_pool.run(
        train_in_layout, RUN, modules, colocate=colocate, num_microbatches=num_microbatches, world_size=ranks
    )
    assert_same(found, plain)
    assert found[0].answers == plain.answers


def test_sequences_of_any_length_are_answered_with_sequence_parallelism(rank_pool: RankPool, plain: History) -> None:
    modules = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=4)}
    found = rank_pool.run(
        train_in_layout, RUN, modules, colocate=False, num_microbatches=2, sequence_parallel=True, world_size=6
    )
    assert_same(found, plain)
    assert found[0].answers == plain.answers

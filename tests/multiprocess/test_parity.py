"""The promise: loss, gradient norm, validation and answers are those of one process, in any layout."""

from __future__ import annotations

import pytest
from megatron.core.distributed import DistributedDataParallelConfig

from lightning_mimo import ModuleParallelism as Cut
from tests.multiprocess.parity import History, Run, train_in_layout, train_plainly
from tests.multiprocess.rank_pool import RankPool

RUN = Run()

# name -> (modules, colocate, num_microbatches, ranks)
LAYOUTS = {
    "images_dp1-language_dp1": ({"images": Cut(), "language": Cut()}, False, 2, 2),
    "images_dp1-language_dp2": ({"images": Cut(dp=1), "language": Cut(dp=2)}, False, 3, 3),
    "images_dp2-language_tp2": ({"images": Cut(dp=2), "language": Cut(tp=2)}, False, 2, 4),
    "images_tp2-language_pp2": ({"images": Cut(tp=2), "language": Cut(pp=2)}, False, 3, 4),
    "images_pp2-language_dp2": ({"images": Cut(pp=2), "language": Cut(dp=2)}, False, 2, 4),
    "images_dp4-language_tp2": ({"images": Cut(dp=4), "language": Cut(tp=2)}, False, 1, 6),
    "images_dp4-language_tp2pp2": ({"images": Cut(dp=4), "language": Cut(tp=2, pp=2)}, False, 3, 8),
    "images_dp1-language_dp4": ({"images": Cut(dp=1), "language": Cut(dp=4)}, False, 1, 5),
    "colocated-one_rank": ({"images": Cut(), "language": Cut()}, True, 2, 1),
    "colocated-images_dp2-language_tp2": ({"images": Cut(dp=2), "language": Cut(tp=2)}, True, 2, 2),
    "colocated-images_dp4-language_tp2dp2": ({"images": Cut(dp=4), "language": Cut(tp=2)}, True, 3, 4),
    "colocated-images_tp4-language_dp4": ({"images": Cut(tp=4), "language": Cut(dp=4)}, True, 1, 4),
}


@pytest.fixture(scope="module")
def plain(rank_pool: RankPool) -> History:
    return rank_pool.run(train_plainly, RUN, world_size=1)[0]


def assert_same(found: list[History], expected: History) -> None:
    """Every rank reports the same numbers, and they are those of the oracle to 1e-5."""
    for history in found:
        assert history == found[0], "ranks report different numbers"
    assert found[0].loss == pytest.approx(expected.loss, rel=1e-5)
    assert found[0].grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert found[0].val_loss == pytest.approx(expected.val_loss, rel=1e-5)
    assert found[0].val_exact_match == pytest.approx(expected.val_exact_match)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_as_one_process(rank_pool: RankPool, plain: History, name: str) -> None:
    modules, colocate, num_microbatches, ranks = LAYOUTS[name]
    found = rank_pool.run(
        train_in_layout, RUN, modules, colocate=colocate, num_microbatches=num_microbatches, world_size=ranks
    )
    assert_same(found, plain)
    assert found[0].answers == plain.answers


@pytest.mark.parametrize("colocate", [False, True], ids=["apart", "colocated"])
def test_accumulated_batches_count_as_one(rank_pool: RankPool, colocate: bool) -> None:
    # 5 batches and windows of 2: the last window of each of the two epochs is short.
    run = Run(samples=60, accumulate=2, steps=6)
    expected = rank_pool.run(train_plainly, run, world_size=1)[0]
    found = rank_pool.run(
        train_in_layout,
        run,
        {"images": Cut(dp=2), "language": Cut(tp=2)},
        colocate=colocate,
        num_microbatches=2,
        world_size=2 if colocate else 4,
    )
    assert_same(found, expected)


def test_short_last_batch_counts_its_own_samples_only(rank_pool: RankPool) -> None:
    run = Run(samples=31, steps=3)
    expected = rank_pool.run(train_plainly, run, world_size=1)[0]
    found = rank_pool.run(
        train_in_layout,
        run,
        {"images": Cut(dp=2), "language": Cut(dp=2)},
        colocate=False,
        num_microbatches=3,
        world_size=4,
    )
    assert_same(found, expected)


@pytest.mark.parametrize("overlap", [False, True], ids=["at_the_end", "overlapped"])
@pytest.mark.parametrize("colocate", [False, True], ids=["apart", "colocated"])
def test_distributed_optimizer_trains_the_same(
    rank_pool: RankPool, plain: History, colocate: bool, overlap: bool
) -> None:
    found = rank_pool.run(
        train_in_layout,
        RUN,
        {"images": Cut(dp=2), "language": Cut(dp=2)},
        colocate=colocate,
        num_microbatches=2,
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=overlap),
        world_size=2 if colocate else 4,
    )
    assert_same(found, plain)

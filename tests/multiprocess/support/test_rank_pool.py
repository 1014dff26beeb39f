"""The pool of ranks: results come back in order, failures come back at once and say what happened."""

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from tests.support.rank_pool import RankFailure, RankPool, current_rank_info


def sum_of_ranks(offset: int = 0) -> int:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return int(total)


def rank_and_pid() -> tuple[int, int]:
    return dist.get_rank(), os.getpid()


def raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        print("about to raise", file=sys.stderr)
        raise ValueError("the cause on rank 1")
    sum_of_ranks()


def lose_the_connection_before_rank_1_raises() -> None:
    if dist.get_rank() == 1:
        time.sleep(0.5)
        raise ValueError("the cause on rank 1")
    raise RuntimeError("[pair.cc:544] Connection closed by peer [127.0.0.1]:1")


def lose_the_connection() -> None:
    raise ConnectionResetError("nobody there")


def exit_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    sum_of_ranks()


def kill_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    sum_of_ranks()


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        sleep_for_a_minute(frames=50)
    sum_of_ranks()


def sleep_for_a_minute(frames: int) -> None:
    """Below more frames than a message shows, as in Trainer.fit()."""
    if frames > 0:
        sleep_for_a_minute(frames - 1)
    sleep_here()


def sleep_here() -> None:
    time.sleep(60.0)


def views_and_parameters() -> dict[str, torch.Tensor]:
    view = torch.arange(100_000).view(2, -1)[:, 0]
    return {"view": view, "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}


def unpicklable_on_rank_0() -> object:
    return (lambda: None) if dist.get_rank() == 0 else None


def initialize_by_itself() -> tuple[int, str]:
    assert not dist.is_initialized()
    info = current_rank_info()
    dist.init_process_group("gloo", init_method=info.init_method, rank=info.rank, world_size=info.world_size)
    os.environ["LEFT_BY_A_CASE"] = "1"
    return sum_of_ranks(), info.rendezvous.name


def left_over_variable() -> str | None:
    return os.environ.get("LEFT_BY_A_CASE")


def batches_from_a_loader_process() -> int:
    return sum(int(batch) for batch in DataLoader(range(4), num_workers=1))


def assert_works(pool: RankPool) -> None:
    assert pool.run(sum_of_ranks, world_size=2) == [1, 1]


@pytest.fixture
def fresh_pool() -> Iterator[RankPool]:
    """For what depends on which processes are still the same: the shared pool renews each after some cases."""
    pool = RankPool(3)
    yield pool
    pool.close()


def test_ranks_communicate(rank_pool: RankPool) -> None:
    assert rank_pool.run(sum_of_ranks, world_size=4) == [6, 6, 6, 6]


def test_arguments_reach_every_rank(rank_pool: RankPool) -> None:
    assert rank_pool.run(sum_of_ranks, 10, world_size=2) == [21, 21]
    assert rank_pool.run(sum_of_ranks, offset=20, world_size=2) == [41, 41]


def test_world_sizes_share_processes(fresh_pool: RankPool) -> None:
    three = fresh_pool.run(rank_and_pid, world_size=3)
    two = fresh_pool.run(rank_and_pid, world_size=2)
    assert two == three[:2]
    assert [rank for rank, _ in three] == [0, 1, 2]
    assert len({pid for _, pid in three}) == 3


def test_tensors_come_back_plain(rank_pool: RankPool) -> None:
    (result,) = rank_pool.run(views_and_parameters, world_size=1)
    assert torch.equal(result["view"], torch.tensor([0, 50_000]))
    assert type(result["parameter"]) is torch.Tensor
    assert result["parameter"].dtype == torch.bfloat16
    assert not result["parameter"].requires_grad


def test_case_may_initialize_by_itself(rank_pool: RankPool) -> None:
    first, second = (rank_pool.run(initialize_by_itself, world_size=2, init=False) for _ in range(2))
    assert [total for total, _ in first + second] == [1, 1, 1, 1]
    assert first[0][1] == first[1][1] != second[0][1]


def test_rank_may_have_children(rank_pool: RankPool) -> None:
    assert rank_pool.run(batches_from_a_loader_process, world_size=2, timeout=20.0) == [6, 6]


def test_environment_is_restored(rank_pool: RankPool) -> None:
    rank_pool.run(initialize_by_itself, world_size=2, init=False)
    assert rank_pool.run(left_over_variable, world_size=2) == [None, None]


def test_current_rank_info_outside_of_a_case() -> None:
    with pytest.raises(RuntimeError, match="outside of a case"):
        current_rank_info()


@pytest.mark.parametrize("world_size", [0, 9])
def test_impossible_world_size(rank_pool: RankPool, world_size: int) -> None:
    with pytest.raises(ValueError, match=rf"world_size={world_size}\): this pool has 1 to 8 ranks"):
        rank_pool.run(sum_of_ranks, world_size=world_size)


def test_raising_rank_ends_the_case(rank_pool: RankPool) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 1 of 2 failed in .*raise_on_rank_1") as failure:
        rank_pool.run(raise_on_rank_1, world_size=2)
    assert time.monotonic() - start < 10.0
    message = str(failure.value)
    assert "Traceback (most recent call last)" in message
    assert 'raise ValueError("the cause on rank 1")' in message
    assert "had not finished and got killed: rank 0" in message
    assert "the end of stderr of rank 1:\nabout to raise" in message
    assert_works(rank_pool)


def test_only_the_ranks_of_a_failed_case_are_replaced(fresh_pool: RankPool) -> None:
    before = fresh_pool.run(rank_and_pid, world_size=3)
    with pytest.raises(RankFailure, match="rank 1 of 2"):
        fresh_pool.run(raise_on_rank_1, world_size=2)
    after = fresh_pool.run(rank_and_pid, world_size=3)
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, False, True]


def test_cause_is_preferred_to_lost_connection(rank_pool: RankPool) -> None:
    with pytest.raises(RankFailure, match="rank 1 of 2 failed") as failure:
        rank_pool.run(lose_the_connection_before_rank_1_raises, world_size=2)
    message = str(failure.value)
    assert "rank 0 failed too: RuntimeError: [pair.cc:544] Connection closed by peer" in message
    assert message.count("Traceback") == 1
    assert_works(rank_pool)


def test_lost_connection_is_reported_without_another_cause(rank_pool: RankPool) -> None:
    with pytest.raises(RankFailure, match="ConnectionResetError: nobody there"):
        rank_pool.run(lose_the_connection, world_size=2)
    assert_works(rank_pool)


@pytest.mark.parametrize(
    ("fn", "end"),
    [(exit_on_rank_1, "exit code 3"), (kill_rank_1, "exit code -9, killed by SIGKILL")],
    ids=["exit", "signal"],
)
def test_dead_rank_is_named(rank_pool: RankPool, fn, end: str) -> None:
    with pytest.raises(RankFailure, match=rf"rank 1 of 2 failed in .*\n\nits process ended with {end}"):
        rank_pool.run(fn, world_size=2)
    assert_works(rank_pool)


def test_hang_is_located(rank_pool: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"rank 0, rank 1 had not finished .* after 2 s") as failure:
        rank_pool.run(hang_on_rank_1, world_size=2, timeout=2.0)
    rank_0, rank_1 = str(failure.value).split("rank 1 was here:")
    assert "in sum_of_ranks" in rank_0
    assert "in sleep_here" in rank_1
    assert_works(rank_pool)


def test_unpicklable_result_is_a_failure(rank_pool: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"rank 0 of 2 failed(.|\n)*pickle"):
        rank_pool.run(unpicklable_on_rank_0, world_size=2)
    assert_works(rank_pool)


def test_closed_pool_leaves_no_process() -> None:
    pool = RankPool(1)
    ((_, pid),) = pool.run(rank_and_pid, world_size=1)
    pool.close()
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

"""What is said of messages that do not match, on records written by hand."""

from __future__ import annotations

import dataclasses

from tests.fake_cuda.matching import problems_of
from tests.fake_cuda.records import Message, RankRecord


def _p2p(source: int, destination: int, *, receives: bool = False, size: int = 4, line: int = 1) -> Message:
    return Message(
        rank=destination if receives else source,
        operation="recv_" if receives else "send",
        group="1",
        members=(0, 1, 2),
        source=source,
        destination=destination,
        size=size,
        dtype="float32",
        waits=receives,
        phase="first step",
        where=f"model.py:{line} forward",
    )


def _all_reduce(rank: int, *, group: str, waits: bool = True) -> Message:
    return Message(
        rank=rank,
        operation="allreduce_",
        group=group,
        members=(0, 1),
        size=4,
        dtype="float32",
        waits=waits,
        phase="first step",
        where=f"{group}.py:1 reduce",
    )


def _problems(*programs: list[Message]) -> list[str]:
    return problems_of([RankRecord(rank=rank, messages=program) for rank, program in enumerate(programs)])


def test_matching_messages() -> None:
    sends = [_p2p(0, 1), _p2p(0, 1, size=8)]
    receives = [_p2p(0, 1, receives=True), _p2p(0, 1, size=8, receives=True)]
    assert _problems(sends, receives, []) == []


def test_swapped_sends() -> None:
    sends = [_p2p(0, 1, size=8, line=7), _p2p(0, 1)]
    receives = [_p2p(0, 1, receives=True, line=9), _p2p(0, 1, size=8, receives=True)]
    (problem,) = _problems(sends, receives, [])
    assert "send to rank 1 of 8 bytes float32 at model.py:7 forward" in problem
    assert "recv from rank 0 of 4 bytes float32 at model.py:9 forward" in problem


def test_missing_receive() -> None:
    (problem,) = _problems([_p2p(0, 1)], [], [])
    assert "rank 1: nothing more" in problem


def test_circle_of_receives() -> None:
    """Each rank receives from the one before it first, and sends after that."""
    programs = [[_p2p((rank - 1) % 3, rank, receives=True), _p2p(rank, (rank + 1) % 3)] for rank in range(3)]
    (problem,) = _problems(*programs)
    assert problem.startswith("deadlock: rank 0 waits in recv from rank 2")
    assert "rank 2 waits in recv from rank 1" in problem


def test_collectives_in_another_order() -> None:
    programs = [[_all_reduce(rank, group=group) for group in order] for rank, order in enumerate(("ab", "ba"))]
    (problem,) = _problems(*programs)
    assert "rank 0 waits in allreduce of 4 bytes float32 at a.py:1 reduce" in problem
    assert "rank 1 waits in allreduce of 4 bytes float32 at b.py:1 reduce" in problem


def test_asynchronous_collectives_in_another_order() -> None:
    """Two groups have two communicators, and nobody waits before both are issued."""
    orders = enumerate(("ab", "ba"))
    programs = [[_all_reduce(rank, group=group, waits=False) for group in order] for rank, order in orders]
    assert _problems(*programs) == []


def test_unequal_exchange() -> None:
    """Rank 0 has 3 rows for rank 1, which expects 2."""

    def exchange(rank: int, sends: tuple[int, int], receives: tuple[int, int]) -> Message:
        return dataclasses.replace(_all_reduce(rank, group="a"), size=0, sends=sends, receives=receives)

    assert _problems([exchange(0, (1, 3), (1, 0))], [exchange(1, (0, 2), (3, 2))]) == []
    (problem,) = _problems([exchange(0, (1, 3), (1, 0))], [exchange(1, (0, 2), (2, 2))])
    assert problem.startswith("message 0 of group a")


def test_groups_in_another_order() -> None:
    records = [RankRecord(rank=0, groups=[(0,), (0, 1)]), RankRecord(rank=1, groups=[(0,), (1,)])]
    (problem,) = problems_of(records)
    assert "process group 1 has the ranks (0, 1) on rank 0, but (1,) on rank 1" in problem

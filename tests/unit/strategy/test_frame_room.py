"""Calls need no new memory, however deep they are."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import pytest

from lightning_mimo.strategy.frame_room import with_room_for_frames

CALLS = 200


def at_depth(depth: int, function: Callable[[], Any]) -> Any:
    return function() if depth == 0 else at_depth(depth - 1, function)


def new_pages(depth: int) -> int:
    """Pages that the system had to find for the same calls, over and over, at some depth."""

    def calls() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(CALLS):
            at_depth(3, int)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    return at_depth(depth, calls)


def largest_number(depths: range) -> int:
    return max(map(new_pages, depths))


def test_calls_of_a_loop_find_room() -> None:
    assert with_room_for_frames(largest_number, range(400)) < CALLS / 2


def test_there_would_be_none_at_some_depth() -> None:
    if largest_number(range(400)) < CALLS:
        pytest.skip("this Python keeps the memory of frames that have returned")


def test_it_hands_on_what_the_function_gets_and_returns() -> None:
    assert with_room_for_frames(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        with_room_for_frames(divmod, 7, 0)

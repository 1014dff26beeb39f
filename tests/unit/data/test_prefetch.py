"""Batches that are loaded early: the same ones in the same order, and nothing is raised before it is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightning_mimo.data.prefetch import LoadsAhead


def two_and_an_error(loaded: list[int]) -> Iterator[int]:
    for number in range(2):
        loaded.append(number)
        yield number
    raise OSError("no such image")


def test_loads_one_batch_and_only_one():
    loaded: list[int] = []
    batches = LoadsAhead(two_and_an_error(loaded))
    batches.load_ahead()
    batches.load_ahead()
    assert loaded == [0]
    assert next(batches) == 0
    assert next(batches) == 1


def test_error_is_raised_in_its_turn():
    batches = LoadsAhead(two_and_an_error([]))
    assert [next(batches), next(batches)] == [0, 1]
    batches.load_ahead()
    with pytest.raises(OSError, match="no such image"):
        next(batches)


@pytest.mark.parametrize("early", [True, False])
def test_end_is_an_end(early: bool):
    batches = LoadsAhead(iter([5]))
    assert next(batches) == 5
    if early:
        batches.load_ahead()
    assert list(batches) == []

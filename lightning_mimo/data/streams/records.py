"""What a shard holds of one sample, read when it is looked at."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol


class Record(Mapping[str, Any]):
    """A sample as a shard holds it, not decoded: name of a field -> its value, which is read when it is asked for."""

    @property
    def where(self) -> str:
        """Shard and sample, for messages."""
        raise NotImplementedError


class Records(Protocol):
    """Samples of one or more shards, which can be read in any order, and fast in the order of the shards."""

    @property
    def shard_lengths(self) -> Sequence[int]:
        """Samples of each shard: a file, or a row group of one."""

    def record(self, index: int) -> Record:
        """A sample; raises DataError if the shard is damaged."""


class ShardNumbers:
    """Which sample of which shard has an index."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self._ends = list(accumulate(lengths))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def find(self, index: int) -> tuple[int, int]:
        """Number of the shard, and of the sample in it.

        Raises:
            IndexError: if there is no such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

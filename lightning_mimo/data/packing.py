"""Packing: several samples in one row of a token budget, in place of one sample padded to the longest."""

from __future__ import annotations

import zlib
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, SequentialSampler

from lightning_mimo.data.wrapped import owner_of, owners_of
from lightning_mimo.errors import DataError

LOOK_AHEAD = 1024
"""Samples among which the packer chooses; no sample is moved further than this from its place in the order."""

_TELLS_LENGTHS = ("lengths", "length")

Row = tuple[int, ...]
"""Indices of the samples of one row, in the order of the sampler."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """How samples become rows.

    Attributes:
        budget: most tokens of a row.
        lengths: int64 ``[samples]``, tokens of every sample of the dataset, the same on every rank.
    """

    budget: int
    lengths: np.ndarray

    @property
    def checksum(self) -> int:
        """Checksum of the lengths. Another one means other rows."""
        return zlib.crc32(np.ascontiguousarray(self.lengths))


def pack_rows(order: Sequence[int], packing: Packing) -> list[Row]:
    """Pack samples into rows, by best fit of the longest first among every ``LOOK_AHEAD`` samples of the order.

    Depends on nothing but its arguments, so every rank and every resumed run finds the same rows.

    Example: lengths 5, 3, 4, 2 with a budget of 7 become the rows ``(0, 3)`` and ``(1, 2)``.

    Args:
        order: indices of samples, as the sampler gives them.
        packing: budget and lengths.

    Returns:
        Rows, in the order of the first sample of each.

    Raises:
        DataError: for a sample that is longer than the budget, naming it.
    """
    indices = np.asarray(order, dtype=np.int64)
    lengths = packing.lengths[indices]
    if len(lengths) and int(lengths.max()) > packing.budget:
        raise _too_long(indices, lengths, packing.budget)
    windows = range(0, len(indices), LOOK_AHEAD)
    return list(
        chain.from_iterable(
            _pack_window(indices[start : start + LOOK_AHEAD], lengths[start : start + LOOK_AHEAD], packing.budget)
            for start in windows
        )
    )


def _pack_window(indices: np.ndarray, lengths: np.ndarray, budget: int) -> list[Row]:
    rows: list[list[int]] = []  # places in the window
    rooms: list[tuple[int, int]] = []  # (free tokens, row), ascending
    sizes = lengths.tolist()
    for place in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[place]
        found = bisect_left(rooms, (size, -1))
        if found == len(rooms):
            room, row = budget, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(found)
        rows[row].append(place)
        if room > size:
            insort(rooms, (room - size, row))
    names = indices.tolist()
    ordered = sorted(sorted(row) for row in rows)
    return [tuple(names[place] for place in row) for row in ordered]


def _too_long(indices: np.ndarray, lengths: np.ndarray, budget: int) -> DataError:
    longer = lengths > budget
    first, number = int(longer.argmax()), int(longer.sum())
    others = f", and so are {number - 1} others of this epoch, up to {lengths.max()} tokens" if number > 1 else ""
    return DataError(
        f"Sample {indices[first]} has {lengths[first]} tokens, more than the {budget} of a row "
        f"(MimoStrategy(pack_to={budget})){others}. Raise pack_to to at least {lengths.max()}, or shorten or leave out "
        f"these samples in your dataset."
    )


def check_evaluation_order(sampler: Any, budget: int) -> None:
    """Refuse a shuffled order of samples that are only evaluated: Lightning asks for their number of batches once.

    Raises:
        DataError: naming the sampler.
    """
    if not isinstance(sampler, SequentialSampler):
        raise DataError(
            f"The DataLoader of an evaluation has a {type(sampler).__name__}, but with MimoStrategy(pack_to={budget}) "
            f"the number of rows depends on the order, and an evaluation must have the same number each time. Leave "
            f"shuffle=True and the sampler out; for a part of the dataset use torch.utils.data.Subset."
        )


def gather_lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of every sample, int64 ``[samples]``. Collective over the world: each rank asks for its part.

    The dataset has ``lengths``, a sequence of numbers, or ``length(index)``, which should not decode images.

    Raises:
        DataError: on every rank, if the dataset has neither, or what it gives is no positive whole number.
    """
    number, ranks, rank = len(dataset), dist.get_world_size(), dist.get_rank()  # type: ignore[arg-type]  # map-style
    mine: Any
    try:
        length = length_of(dataset)
        mine = np.array([_checked(index, length(index)) for index in range(rank, number, ranks)], dtype=np.int64)
    except Exception as error:  # the dataset's own as well: the other ranks must not wait for this one
        mine = error
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(
        parts, (f"{type(mine).__name__}: {mine}", None) if isinstance(mine, Exception) else (None, mine)
    )
    if isinstance(mine, DataError):
        raise mine
    for where, (problem, _) in enumerate(parts):
        if problem is not None:
            cause = mine if isinstance(mine, Exception) else None
            raise DataError(f"The lengths of samples could not be found, on rank {where}: {problem}") from cause
    lengths = np.empty(number, dtype=np.int64)
    for where, (_, part) in enumerate(parts):
        lengths[where::ranks] = part
    return lengths


def length_of(dataset: Dataset) -> Callable[[int], Any]:
    """Function that gives the tokens of a sample, through ``torch.utils.data.Subset`` and ``ConcatDataset``.

    Raises:
        DataError: if the dataset, or a part of it, does not tell lengths.
    """
    for owner in owners_of(dataset, *_TELLS_LENGTHS):
        if _told_by(owner) is None:
            raise DataError(
                f"MimoStrategy(pack_to=...) must know the lengths of samples before they are loaded, and "
                f"{type(owner).__name__} does not tell them. Give it a method length(index), the number of tokens in "
                f"input_ids (placeholders included, padding not), or an attribute lengths with one number for each "
                f"sample; for shards TarShards(length=...) or ParquetShards(length=...)."
            )
    return partial(_length, dataset)


def _length(dataset: Dataset, index: int) -> Any:
    owner, inner = owner_of(dataset, index, *_TELLS_LENGTHS)
    length = _told_by(owner)
    assert length is not None, "length_of has asked every part"
    return length(inner)


def _told_by(owner: Any) -> Callable[[int], Any] | None:
    if (lengths := getattr(owner, "lengths", None)) is not None and not callable(lengths):
        return lengths.__getitem__
    length = getattr(owner, "length", None)
    return length if callable(length) else None


def _checked(index: int, length: Any) -> int:
    if isinstance(length, np.generic | np.ndarray | torch.Tensor) and length.ndim == 0:
        length = length.item()
    if isinstance(length, bool) or not isinstance(length, int):
        raise DataError(
            f"Sample {index}: length(index) or lengths gives {length!r}, a {type(length).__name__}, but must give a "
            f"number of tokens."
        )
    if length < 1:
        raise DataError(f"Sample {index}: length(index) or lengths gives {length}; a sample has at least one token.")
    return length

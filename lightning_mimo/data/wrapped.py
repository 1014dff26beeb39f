"""What a dataset tells of its samples, found through ``torch.utils.data.Subset`` and ``ConcatDataset``."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

from torch.utils.data import ConcatDataset, Subset


def owner_of(dataset: Any, index: int, *names: str) -> tuple[Any, int]:
    """The innermost dataset of a sample, and the sample's index there.

    Args:
        dataset: map-style.
        index: of the sample in it.
        names: attributes; a dataset that has one of them is not looked into.
    """
    while not _has(dataset, names):
        if _is_plain(dataset, Subset):
            dataset, index = dataset.dataset, dataset.indices[index]
        elif _is_plain(dataset, ConcatDataset):
            part = bisect_right(dataset.cumulative_sizes, index)
            start = dataset.cumulative_sizes[part - 1] if part else 0
            dataset, index = dataset.datasets[part], index - start
        else:
            break
    return dataset, index


def owners_of(dataset: Any, *names: str) -> Iterator[Any]:
    """All datasets that :func:`owner_of` can return."""
    if not _has(dataset, names) and _is_plain(dataset, Subset):
        yield from owners_of(dataset.dataset, *names)
    elif not _has(dataset, names) and _is_plain(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from owners_of(part, *names)
    else:
        yield dataset


def _has(dataset: Any, names: tuple[str, ...]) -> bool:
    return any(hasattr(dataset, name) for name in names)


def _is_plain(dataset: Any, kind: Any) -> bool:
    """Whether it is of the kind, and a subclass has not changed what its samples are."""
    return isinstance(dataset, kind) and type(dataset).__getitem__ is kind.__getitem__

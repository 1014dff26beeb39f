"""An order of samples that reads a few shards at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import Sampler

from lightning_mimo.errors import ConfigError

SHARDS_AT_ONCE = 4
"""Shards whose samples are mixed."""


class ShardSampler(Sampler[int]):
    """Shuffles the shards, and then the samples of a few consecutive ones together.

    It draws from torch's default generator, which MimoStrategy seeds from the seed of the run and the epoch.

    Example: shards of 2, 2, 1 and 2 samples, two at once, may come as ``[3, 5, 2, 6, 0, 4, 1]``: the second and the
    fourth mixed, then the first and the third.
    """

    def __init__(self, dataset: Any, *, shuffle: bool = True, shards_at_once: int = SHARDS_AT_ONCE) -> None:
        """
        Args:
            dataset: has ``shard_lengths``, the number of samples of each shard: TarShards, ParquetShards, ChatDataset.
            shuffle: whether to shuffle; otherwise the order is that of the shards.
            shards_at_once: shards whose samples are mixed. More mix better, and read from more places at once.

        Raises:
            ConfigError: if the dataset has no shards, or the number is below 1.
        """
        lengths: Sequence[int] | None = getattr(dataset, "shard_lengths", None)
        if lengths is None:
            raise ConfigError(
                f"ShardSampler orders a dataset with shard_lengths, such as TarShards, but got a "
                f"{type(dataset).__name__}. Use DataLoader(shuffle=True) for it."
            )
        if shards_at_once < 1:
            raise ConfigError(f"ShardSampler(shards_at_once={shards_at_once}) must be at least 1.")
        self._lengths = tuple(lengths)
        self._shuffle = shuffle
        self._shards_at_once = shards_at_once

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: says that the order of an epoch does not depend on those before it."""

    def __len__(self) -> int:
        return sum(self._lengths)

    def __iter__(self) -> Iterator[int]:
        if not self._shuffle:
            yield from range(len(self))
            return
        begins = [0, *accumulate(self._lengths)]
        shards = torch.randperm(len(self._lengths)).tolist()
        for first in range(0, len(shards), self._shards_at_once):
            chosen = shards[first : first + self._shards_at_once]
            samples = torch.cat([torch.arange(begins[shard], begins[shard + 1]) for shard in chosen])
            yield from samples[torch.randperm(len(samples))].tolist()

"""Assigns the samples of a global batch to microbatches and to the data-parallel ranks of each module.

A global batch is an ordered list of samples. It is split into ``num_microbatches`` contiguous ranges of equal size.
Each of these is split once more per module: data-parallel rank ``d`` of ``dp`` takes the ``d``-th of ``dp`` ranges:

    position      0  1  2  3 | 4  5  6  7        global_batch_size=8, num_microbatches=2
    microbatch    0  0  0  0 | 1  1  1  1
    images dp=2   0  0  1  1 | 0  0  1  1
    language dp=1 0  0  0  0 | 0  0  0  0

The dp sizes divide one another, so the samples of an encoder replica are a contiguous part of those of a language
replica, or the reverse. They are in the order in which the bridges concatenate and split. Pure Python, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_mimo.errors import LayoutError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE


def shard(*, global_batch_size: int, num_microbatches: int, dp: int, dp_rank: int, microbatch: int) -> range:
    """Positions in the global batch that one data-parallel rank takes in one microbatch.

    Example: of 8 samples in 2 microbatches, rank 1 of dp=2 takes ``range(2, 4)`` and then ``range(6, 8)``.
    """
    size = global_batch_size // (num_microbatches * dp)
    start = microbatch * (global_batch_size // num_microbatches) + dp_rank * size
    return range(start, start + size)


def validate_batch_sizes(
    dp_sizes: Mapping[str, int], *, global_batch_size: int, num_microbatches: int
) -> dict[str, int]:
    """Check that a global batch divides over every module, and return the micro batch size of each.

    Args:
        dp_sizes: module name -> number of data-parallel replicas.
        global_batch_size: samples of one global batch, over all ranks. Without gradient accumulation an optimizer step
            uses one global batch.
        num_microbatches: number of microbatches that a global batch is split into.

    Returns:
        Module name -> samples per microbatch and data-parallel rank,
        ``global_batch_size / (num_microbatches * dp)``.

    Raises:
        LayoutError: if a size is not a positive integer, or the global batch does not divide over a module.
    """
    for name, value in (("global_batch_size", global_batch_size), ("num_microbatches", num_microbatches)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise LayoutError(f"{name}={value!r} must be a whole number of at least 1.")
    unit = num_microbatches * math.lcm(*dp_sizes.values())
    below = global_batch_size // unit * unit
    fits = " or ".join(str(n) for n in (below, below + unit) if n)
    for name, dp in dp_sizes.items():
        if global_batch_size % (num_microbatches * dp):
            raise LayoutError(
                f"global_batch_size={global_batch_size} does not divide over module {name!r}: num_microbatches * dp = "
                f"{num_microbatches} * {dp} = {num_microbatches * dp}, and {global_batch_size} / "
                f"{num_microbatches * dp} = {global_batch_size / (num_microbatches * dp):g}. "
                f"Use global_batch_size={fits}, or other num_microbatches."
            )
    return {name: global_batch_size // (num_microbatches * dp) for name, dp in dp_sizes.items()}


def micro_batch_sizes(layout: MimoLayout, *, global_batch_size: int, num_microbatches: int) -> dict[str, int]:
    """:func:`validate_batch_sizes` of a layout: module name -> samples per microbatch and data-parallel rank.

    Raises:
        LayoutError: if the global batch does not divide over a module.
    """
    return validate_batch_sizes(
        {name: sizes.dp for name, sizes in layout.modules.items()},
        global_batch_size=global_batch_size,
        num_microbatches=num_microbatches,
    )


@dataclass(frozen=True, kw_only=True)
class RankBatchPlan:
    """What one rank loads of every global batch.

    Attributes:
        rank: the global rank.
        global_batch_size: samples of one global batch, over all ranks.
        shards: module name -> one range of positions in the global batch per microbatch. Only modules of this rank.
        loads: the modules of this rank whose inputs it loads. Encoder inputs are loaded by the first pipeline stage
            only.
        dp_sizes: module name -> number of data-parallel replicas, of all modules of the layout.
    """

    rank: int
    global_batch_size: int
    shards: Mapping[str, tuple[range, ...]]
    loads: frozenset[str]
    dp_sizes: Mapping[str, int]

    @classmethod
    def build(cls, layout: MimoLayout, rank: int, *, global_batch_size: int, num_microbatches: int) -> RankBatchPlan:
        """Build the plan for one rank of a layout.

        Raises:
            LayoutError: if the global batch does not divide over a module.
        """
        micro_batch_sizes(layout, global_batch_size=global_batch_size, num_microbatches=num_microbatches)
        shards = {
            name: tuple(
                shard(
                    global_batch_size=global_batch_size,
                    num_microbatches=num_microbatches,
                    dp=layout.modules[name].dp,
                    dp_rank=layout.modules[name].coordinates(rank)["dp"],
                    microbatch=microbatch,
                )
                for microbatch in range(num_microbatches)
            )
            for name in layout.modules_on(rank)
        }
        loads = frozenset(
            name for name in shards if name == LANGUAGE or layout.modules[name].coordinates(rank)["pp"] == 0
        )
        dp_sizes = {name: sizes.dp for name, sizes in layout.modules.items()}
        return cls(rank=rank, global_batch_size=global_batch_size, shards=shards, loads=loads, dp_sizes=dp_sizes)

    @property
    def num_microbatches(self) -> int:
        return len(next(iter(self.shards.values())))

    def samples_on_rank(self, microbatch: int) -> range:
        """Positions that any module of this rank needs.

        They are one contiguous range, because the shards of several modules on one rank contain one another.
        """
        runs = [shards[microbatch] for shards in self.shards.values()]
        return range(min(run.start for run in runs), max(run.stop for run in runs))

    def bridge_samples(self, module: str, microbatch: int) -> range:
        """Positions that the bridge of an encoder handles on this rank: the larger shard of its two ends."""
        own = self.shards[module][microbatch]
        return max(own, self.shards.get(LANGUAGE, self.shards[module])[microbatch], key=len)

    def text_samples(self, microbatch: int) -> range:
        """Positions whose token ids enter the forward pass: the language shard if there is one on this rank, else all
        samples of this rank."""
        return self.shards[LANGUAGE][microbatch] if LANGUAGE in self.shards else self.samples_on_rank(microbatch)

    def needed_by(self, position: int, microbatch: int) -> frozenset[str]:
        """Modules of this rank for which it loads the sample at a given position."""
        return frozenset(name for name in self.loads if position in self.shards[name][microbatch])

"""Which samples of a global batch each module's data-parallel rank takes, and in which microbatch.

A global batch is an ordered list of samples. It is cut into ``num_microbatches`` equal runs; inside one run,
data-parallel rank ``d`` of a module with ``dp`` replicas takes the ``d``-th of ``dp`` equal runs:

    position      0  1  2  3 | 4  5  6  7        global_batch_size=8, num_microbatches=2
    microbatch    0  0  0  0 | 1  1  1  1
    images dp=2   0  0  1  1 | 0  0  1  1
    language dp=1 0  0  0  0 | 0  0  0  0

Because dp sizes divide one another, the samples of an encoder replica are a run of those of a language replica,
or the other way round, in the order in which the bridges concatenate and split. Pure Python, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_mimo.errors import LayoutError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE


def shard(*, global_batch_size: int, num_microbatches: int, dp: int, dp_rank: int, microbatch: int) -> range:
    """Positions in the global batch that one data-parallel rank takes in one microbatch."""
    size = global_batch_size // (num_microbatches * dp)
    start = microbatch * (global_batch_size // num_microbatches) + dp_rank * size
    return range(start, start + size)


def validate_batch_sizes(
    dp_sizes: Mapping[str, int], *, global_batch_size: int, num_microbatches: int
) -> dict[str, int]:
    """Check that a global batch divides over every module and return each module's micro batch size.

    Args:
        dp_sizes: module name -> number of data-parallel replicas.
        global_batch_size: samples per optimizer step and accumulation step, over all ranks.
        num_microbatches: pipeline microbatches that they are cut into.

    Returns:
        Module name -> samples per microbatch and data-parallel rank,
        ``global_batch_size / (num_microbatches * dp)``.

    Raises:
        LayoutError: if a size is not a positive whole number or does not divide.
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
        global_batch_size: samples per step over all ranks.
        shards: module name -> one range of positions in the global batch per microbatch. Only modules of this rank.
        loads: those of these modules whose inputs this rank loads: of an encoder, its first pipeline stage does.
    """

    rank: int
    global_batch_size: int
    shards: Mapping[str, tuple[range, ...]]
    loads: frozenset[str]

    @classmethod
    def build(cls, layout: MimoLayout, rank: int, *, global_batch_size: int, num_microbatches: int) -> RankBatchPlan:
        """Plan for one rank of a layout.

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
        return cls(rank=rank, global_batch_size=global_batch_size, shards=shards, loads=loads)

    @property
    def num_microbatches(self) -> int:
        return len(next(iter(self.shards.values())))

    def samples_on_rank(self, microbatch: int) -> range:
        """Positions that any module of this rank needs. One run: where there are several modules, all their shards lie
        in the language shard or around it."""
        runs = [shards[microbatch] for shards in self.shards.values()]
        return range(min(run.start for run in runs), max(run.stop for run in runs))

    def bridge_samples(self, module: str, microbatch: int) -> range:
        """Positions that the bridge of an encoder deals with on this rank: the larger shard of its two ends."""
        own = self.shards[module][microbatch]
        return max(own, self.shards.get(LANGUAGE, self.shards[module])[microbatch], key=len)

    def text_samples(self, microbatch: int) -> range:
        """Positions whose token ids go into the forward pass: the language shard, or an encoder rank's own."""
        return self.shards[LANGUAGE][microbatch] if LANGUAGE in self.shards else self.samples_on_rank(microbatch)

    def needed_by(self, position: int, microbatch: int) -> frozenset[str]:
        """Modules of this rank for which it loads the sample at a position."""
        return frozenset(name for name in self.loads if position in self.shards[name][microbatch])

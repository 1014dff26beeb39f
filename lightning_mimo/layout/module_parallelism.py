"""Parallel sizes of one module, and how error messages print them: pure data."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

LANGUAGE = "language"
"""Name of the module that every layout must have; equal to megatron-core's ``MIMO_LANGUAGE_MODULE_KEY``."""

DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("expt_tp", "ep", "expt_dp", "pp")


@dataclass(frozen=True, kw_only=True)
class ModuleParallelism:
    """Parallel sizes of one module over its own ranks.

    Args:
        tp: tensor-parallel size.
        cp: context-parallel size. Only 1 is supported: the bridges between modules do not split sequences.
        pp: number of pipeline stages. Must be 1 where modules are colocated.
        dp: number of data-parallel replicas. ``None`` uses the ranks that the other modules leave free.
        ep: expert-parallel size (mixture-of-experts layers).
        expt_tp: tensor-parallel size inside one expert.
        rank_offset: first global rank of the module. ``None`` places it right after the previous module.
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int | None = None
    ep: int = 1
    expt_tp: int = 1
    rank_offset: int | None = None

    @property
    def ranks_per_replica(self) -> int:
        """Number of ranks of one data-parallel replica: tp * cp * pp."""
        return self.tp * self.cp * self.pp

    @property
    def replicas(self) -> int:
        """``dp``, once it is known."""
        assert self.dp is not None, "dp is filled in by MimoLayout.resolve"
        return self.dp

    @property
    def size(self) -> int:
        """Number of ranks of the module: tp * cp * dp * pp. Requires that ``dp`` is known."""
        return self.ranks_per_replica * self.replicas

    def resolved(self) -> ResolvedParallelism:
        """The same sizes as a :class:`ResolvedParallelism`, once ``dp`` and ``rank_offset`` are known."""
        return ResolvedParallelism(**{field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class ResolvedParallelism(ModuleParallelism):
    """A module's sizes in a resolved layout: ``dp`` and ``rank_offset`` are numbers.

    Args:
        dp: number of data-parallel replicas.
        rank_offset: first global rank of the module.
    """

    dp: int
    rank_offset: int

    @property
    def ranks(self) -> range:
        """Global ranks of the module."""
        return range(self.rank_offset, self.rank_offset + self.size)

    @property
    def expt_dp(self) -> int:
        """Data-parallel replicas of one expert: tp * cp * dp / (expt_tp * ep)."""
        return self.size // (self.expt_tp * self.ep * self.pp)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sizes of the dense axes, in the order of ``DENSE_AXES``."""
        return (self.tp, self.cp, self.dp, self.pp)

    @property
    def expert_shape(self) -> tuple[int, int, int, int]:
        """Sizes of the expert axes, in the order of ``EXPERT_AXES``."""
        return (self.expt_tp, self.ep, self.expt_dp, self.pp)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Index of a global rank along each dense axis, e.g. ``{"tp": 1, "cp": 0, "dp": 0, "pp": 1}``."""
        assert rank in self.ranks, f"rank {rank} is not in {self.ranks}"
        rest = rank - self.ranks.start
        place = {}
        for axis, size in zip(DENSE_AXES, self.shape, strict=True):
            rest, place[axis] = divmod(rest, size)
        return place

    def rank_at(self, *, tp: int, dp: int, pp: int) -> int:
        """Global rank with these coordinates and cp=0: the inverse of :meth:`coordinates`."""
        rank = 0
        for axis, size in reversed(list(zip(DENSE_AXES, self.shape, strict=True))):
            rank = rank * size + {"tp": tp, "cp": 0, "dp": dp, "pp": pp}[axis]
        return self.ranks.start + rank


def fitting_trainer(world_size: int) -> str:
    """Trainer arguments that give ``world_size`` ranks, for error messages, such as ``devices=4``."""
    text = f"devices={world_size}"
    for devices in (8, 4, 2):
        if world_size > devices and world_size % devices == 0:
            return f"{text}, or devices={devices} with num_nodes={world_size // devices}"
    return text


def dp_step_of_experts(sizes: ModuleParallelism) -> int:
    """Smallest dp that the expert sizes allow; every allowed dp is a multiple of it."""
    experts = sizes.expt_tp * sizes.ep
    return experts // math.gcd(experts, sizes.tp)


def product_of(sizes: ModuleParallelism) -> str:
    """Factors of a module's number of ranks, for error messages, such as ``tp=2 * dp=3``."""
    factors = {"tp": sizes.tp, "cp": sizes.cp, "pp": sizes.pp}
    shown = [f"{axis}={size}" for axis, size in factors.items() if size > 1 or axis == "tp"]
    if sizes.dp is not None:
        shown.append(f"dp={sizes.dp}")
    return " * ".join(shown)


def span_of(ranks: range) -> str:
    """A range of ranks, for error messages, such as ``0-3``."""
    return f"{ranks.start}" if len(ranks) == 1 else f"{ranks.start}-{ranks.stop - 1}"

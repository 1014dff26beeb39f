"""Describes where a shard lies in the full tensor, cuts shards, and joins them for another layout.

A tensor is sharded twice: tensor parallelism splits it along one dimension, and the distributed optimizer splits the
flattened shard into ranges of consecutive elements. A :class:`ShardSpec` describes both without reference to a layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from lightning_mimo.errors import CheckpointError
from lightning_mimo.mimo.initialization import cut_evenly, partition_of, shard_group

WEIGHT, MAIN = "weight", "main"
"""Kinds of shards: a parameter, and the optimizer's float32 copy of it. All other kinds are names of optimizer state,
such as ``exp_avg``."""


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """Position of a shard in the full tensor.

    Example: the second of two tensor-parallel shards of a ``[8, 4]`` weight that is split along its rows, all of its 16
    elements: ``ShardSpec(shape=(8, 4), dim=0, tp_rank=1, tp_size=2, stop=16)``.

    Attributes:
        shape: shape of the full tensor.
        dim: dimension along which tensor parallelism splits it.
        stride: number of matrices that are concatenated along ``dim`` and split separately.
        tp_rank: index of the tensor-parallel shard.
        tp_size: number of tensor-parallel shards.
        start: first element, in the flattened tensor-parallel shard.
        stop: one past the last element.
    """

    shape: tuple[int, ...]
    dim: int = 0
    stride: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    start: int = 0
    stop: int

    @classmethod
    def of(cls, parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> ShardSpec:
        """Spec of a parameter on this rank: its entire tensor-parallel shard."""
        shape = list(parameter.shape)
        group = shard_group(parameter, groups)
        if group is None:
            return cls(shape=tuple(shape), stop=parameter.numel())
        dim, stride = partition_of(parameter)
        shape[dim] *= group.size()
        return cls(
            shape=tuple(shape),
            dim=dim,
            stride=stride,
            tp_rank=group.rank(),
            tp_size=group.size(),
            stop=parameter.numel(),
        )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ShardSpec:
        """Create a spec from the result of :meth:`to_dict`, also after a round trip through JSON."""
        return cls(**{**fields, "shape": tuple(fields["shape"])})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of the tensor-parallel shard that contains this one."""
        shape = list(self.shape)
        if shape:
            shape[self.dim] //= self.tp_size
        return tuple(shape)

    def is_same_shard(self, other: ShardSpec) -> bool:
        """Whether both lie in the same tensor-parallel shard, split in the same way."""
        mine = (self.shape, self.dim, self.stride, self.tp_rank, self.tp_size)
        return mine == (other.shape, other.dim, other.stride, other.tp_rank, other.tp_size)


def cut(whole: torch.Tensor, spec: ShardSpec) -> torch.Tensor:
    """Return the elements of a full tensor that a spec describes, flat."""
    if spec.tp_size > 1:
        whole = cut_evenly(whole, dim=spec.dim, stride=spec.stride, rank=spec.tp_rank, size=spec.tp_size)
    return whole.reshape(-1)[spec.start : spec.stop]


def join(pieces: Iterable[tuple[ShardSpec, torch.Tensor]]) -> torch.Tensor:
    """Join pieces that cover a tensor to the full tensor. Duplicates of a piece are ignored.

    Raises:
        CheckpointError: if elements are missing.
    """
    runs: dict[int, dict[int, tuple[ShardSpec, torch.Tensor]]] = {}
    for spec, tensor in pieces:
        runs.setdefault(spec.tp_rank, {})[spec.start] = (spec, tensor)
    first = next(iter(next(iter(runs.values())).values()))[0]
    shards = [_join_runs(runs.get(rank, {}).values(), first) for rank in range(first.tp_size)]
    if first.tp_size == 1:
        return shards[0]
    cut_up = [shard.chunk(first.stride, dim=first.dim) for shard in shards]
    return torch.cat([shard[i] for i in range(first.stride) for shard in cut_up], dim=first.dim)


def _join_runs(runs: Iterable[tuple[ShardSpec, torch.Tensor]], like: ShardSpec) -> torch.Tensor:
    ordered: Sequence[tuple[ShardSpec, torch.Tensor]] = sorted(runs, key=lambda run: run[0].start)
    flat = torch.cat([tensor.reshape(-1) for _, tensor in ordered]) if ordered else torch.empty(0)
    if flat.numel() != math.prod(like.shard_shape):
        raise CheckpointError(f"only {flat.numel()} of {math.prod(like.shard_shape)} elements of a shard were found")
    return flat.reshape(like.shard_shape)

"""Describes where a shard lies in the full tensor, cuts shards, and joins them for another layout.

A tensor is sharded twice: tensor parallelism splits it along one dimension, and the distributed optimizer splits the
flattened shard into ranges of consecutive elements. A :class:`ShardSpec` describes both without reference to a layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
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
        """Create a spec from the result of :meth:`to_dict`, also after a round trip through JSON.

        Raises:
            CheckpointError: if a field is missing or out of range.
        """
        names = {field.name for field in dataclass_fields(cls)}
        if not isinstance(fields, dict) or set(fields) != names or not isinstance(fields["shape"], list | tuple):
            raise CheckpointError(f"{fields!r} does not describe a shard")
        numbers = [*fields["shape"], *(value for name, value in fields.items() if name != "shape")]
        spec = cls(**{**fields, "shape": tuple(fields["shape"])})
        if not all(type(number) is int and number >= 0 for number in numbers) or not spec._is_possible():
            raise CheckpointError(f"{fields!r} does not describe a shard")
        return spec

    def _is_possible(self) -> bool:
        if (self.shape and self.dim >= len(self.shape)) or not 0 <= self.tp_rank < self.tp_size or self.stride < 1:
            return False
        if self.tp_size > 1 and (not self.shape or self.shape[self.dim] % (self.tp_size * self.stride)):
            return False
        return self.start <= self.stop <= math.prod(self.shard_shape)

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


def check_coverage(specs: Sequence[ShardSpec]) -> None:
    """Check that pieces cover a tensor. Duplicates of a piece are allowed.

    Raises:
        CheckpointError: if elements are missing or overlap, or pieces are cut in different ways.
    """
    if not specs:
        raise CheckpointError("none of its shards was found")
    first = specs[0]
    if any(replace(spec, tp_rank=0, start=0, stop=0) != replace(first, tp_rank=0, start=0, stop=0) for spec in specs):
        raise CheckpointError("its shards are cut in different ways")
    runs: dict[int, set[tuple[int, int]]] = {rank: set() for rank in {spec.tp_rank for spec in specs}}
    for spec in specs:
        runs[spec.tp_rank].add((spec.start, spec.stop))
    size = math.prod(first.shard_shape)
    if len(runs) < first.tp_size:
        raise CheckpointError(f"only {len(runs)} of {first.tp_size} tensor-parallel shards were found")
    for each in runs.values():
        position = 0
        for start, stop in sorted(each):
            if start != position:
                break
            position = stop
        if position != size:
            raise CheckpointError(f"only {position} of {size} elements of a shard were found")


def join(pieces: Iterable[tuple[ShardSpec, torch.Tensor]]) -> torch.Tensor:
    """Join pieces that cover a tensor to the full tensor. Duplicates of a piece are ignored.

    Raises:
        CheckpointError: if elements are missing.
    """
    pieces = list(pieces)
    check_coverage([spec for spec, _ in pieces])
    first = pieces[0][0]
    shards = []
    for rank in range(first.tp_size):
        runs = {spec.start: tensor for spec, tensor in pieces if spec.tp_rank == rank and spec.stop > spec.start}
        flat = [runs[start].reshape(-1) for start in sorted(runs)] or [pieces[0][1].reshape(-1)[:0]]
        shards.append(torch.cat(flat).reshape(first.shard_shape))
    if first.tp_size == 1:
        return shards[0]
    cut_up = [shard.chunk(first.stride, dim=first.dim) for shard in shards]
    return torch.cat([shard[i] for i in range(first.stride) for shard in cut_up], dim=first.dim)

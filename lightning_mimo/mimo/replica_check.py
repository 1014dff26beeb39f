"""Checks before training that replicas hold equal weights.

Every data-parallel replica adds the same updates to its own copy, so copies that differ at the start keep differing,
and the loss does not show it. The same is true for parameters that are not sharded over tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lightning_mimo.errors import ReplicaError
from lightning_mimo.mimo.model import RaggedMimoModel
from lightning_mimo.mimo.parameter_names import named_buffers_of, named_parameters_of, on_any_rank
from lightning_mimo.parallel.infra import MimoModelInfra

_ABSENT = -1
_BEYOND = 2**62  # greater than any checksum
_CHUNK = 2**22  # elements of a parameter that are processed at a time
# float64 is read as two halves, because the highest of 64 bits would be lost.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


@dataclass(frozen=True, kw_only=True)
class _Copies:
    """Parameters and buffers of one module on this rank, and the ranks that hold copies of them.

    Attributes:
        module: name of the module.
        group: the ranks that are compared.
        parameters: global name -> parameter, with the same names in the same order on all ranks of the group.
        shards: number of shards of a sharded parameter within the group.
        shard: index of this rank's shard.
    """

    module: str
    group: dist.ProcessGroup
    parameters: Mapping[str, torch.Tensor]
    shards: int
    shard: int


def check_replicas(model: RaggedMimoModel, infra: MimoModelInfra) -> None:
    """Compare the weights of all modules over their replicas. Collective over the world.

    Each module takes one all-reduce of two integers per parameter and tensor-parallel rank, and a second one if it has
    experts.

    Args:
        model: the model, wrapped or not; asynchronous gathering of weights must be complete.
        infra: process groups.

    Raises:
        ReplicaError: on every rank, naming the module, the first parameter that differs, and the checksum on each rank.
    """
    differing: dict[tuple[str, str], int] = {}
    for module in infra.participating_modules:
        for copies in _copies_of(model, infra, module):
            differing |= _compare(copies)
    (anywhere,) = on_any_rank([bool(differing)])
    if anywhere:
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, differing)
        raise ReplicaError(_describe(ranks))


def has_buffers(model: RaggedMimoModel, infra: MimoModelInfra) -> bool:
    """Whether any module on any rank has a persistent buffer. Collective over the world."""
    modules = infra.participating_modules
    return on_any_rank([any(True for module in modules for _ in named_buffers_of(model, infra, module))])[0]


def check_buffers(model: RaggedMimoModel, infra: MimoModelInfra) -> None:
    """Compare the persistent buffers of all modules over their replicas after a step. Collective over the world.

    Raises:
        ReplicaError: on every rank, naming the module and the first buffer that differs.
    """
    differing: list[str] = []
    for module in infra.participating_modules:
        groups, buffers = infra.pg_collections[module], dict(named_buffers_of(model, infra, module))
        copies = _Copies(module=module, group=groups.tp_dp_cp, parameters=buffers, shards=1, shard=0)
        differing += [name for _, name in _compare(copies)]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, differing)
    if names := [name for held in ranks for name in held]:
        raise ReplicaError(
            f"The buffer {names[0]!r} has become different on the replicas of its module, because each of them sees "
            f"other samples, so results would depend on the layout, and a checkpoint could hold one of them only. "
            f"Update it from numbers that are summed over torch.distributed, or not at all (FrozenBatchNorm), or "
            f"register it with persistent=False."
        )


def _copies_of(model: RaggedMimoModel, infra: MimoModelInfra, module: str) -> Iterator[_Copies]:
    groups = infra.pg_collections[module]
    dense: dict[str, torch.Tensor] = dict(named_buffers_of(model, infra, module))
    experts: dict[str, torch.Tensor] = {}
    for name, parameter in named_parameters_of(model, infra, module):
        (dense if getattr(parameter, "allreduce", True) else experts)[name] = parameter
    yield _Copies(
        module=module, group=groups.tp_dp_cp, parameters=dense, shards=groups.tp.size(), shard=groups.tp.rank()
    )
    # Ranks of expt_dp hold the same shard of the same experts.
    yield _Copies(module=module, group=groups.expt_dp, parameters=experts, shards=1, shard=0)


def _compare(copies: _Copies) -> dict[tuple[str, str], int]:
    """(module, name) -> this rank's checksum, for all parameters that differ between ranks of the group."""
    if not copies.parameters or copies.group.size() == 1:
        return {}
    sums = torch.stack([checksum(parameter) for parameter in copies.parameters.values()])
    slots = torch.tensor([_slot(each, copies) for each in copies.parameters.values()], device=sums.device)
    held = sums.new_full((len(sums), copies.shards), _ABSENT)
    held.scatter_(1, slots.unsqueeze(1), sums.unsqueeze(1))
    # Maxima of the checksums and of their negatives: if all ranks agree, their sum is zero.
    extremes = torch.stack([held, torch.where(held == _ABSENT, -_BEYOND, -held)])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=copies.group)
    largest, smallest = extremes[0], -extremes[1]
    differs = ((largest != smallest) & (held != _ABSENT)).any(dim=1).tolist()
    if not any(differs):
        return {}
    return {
        (copies.module, name): value
        for name, value, is_other in zip(copies.parameters, sums.tolist(), differs, strict=True)
        if is_other
    }


def _slot(parameter: torch.Tensor, copies: _Copies) -> int:
    """Index of the shard of a parameter that this rank holds; 0 if the parameter is not sharded."""
    return copies.shard if getattr(parameter, "tensor_model_parallel", False) else 0


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Checksum of all bits of a tensor and their positions: int64 scalar from 0 to 2**62 - 1, on its device.

    Equal tensors have equal checksums on every device.
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in bits.split(_CHUNK):
        places = torch.arange(1, 2 * chunk.numel(), 2, device=tensor.device)
        # Sums and products of integers wrap around, so the order in which a device adds them does not matter.
        total = total * 1_000_003 + (chunk * places).sum()
    return total & (_BEYOND - 1)


def _describe(ranks: Sequence[Mapping[tuple[str, str], int]]) -> str:
    """Error message from the checksums that each rank holds of the differing parameters."""
    names = list(dict.fromkeys(key for held in ranks for key in held))
    module, name = names[0]
    holders: dict[int, list[int]] = {}
    for rank, held in enumerate(ranks):
        if (module, name) in held:
            holders.setdefault(held[module, name], []).append(rank)
    values = "; ".join(f"ranks {where} hold {value:016x}" for value, where in holders.items())
    more = f", and so do {len(names) - 1} more parameters" if len(names) > 1 else ""
    return (
        f"Module {module!r}: the ranks that hold copies of {name!r} hold different values; by checksum: "
        f"{values}{more}. "
        f"Replicas that differ at the start stay different. Weights may depend only on the seed and on their name: "
        f"load the same file on all ranks, and do not draw from a generator that is seeded by rank. A parameter that "
        f"is sharded over tensor-parallel ranks must be marked with tensor_model_parallel=True and its partition_dim."
    )

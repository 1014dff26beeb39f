"""Checks before training that ranks which are to hold the same weights do.

Data-parallel replicas each add what they have learned to their own copy, so copies that begin apart stay apart, and no
loss shows it. The same holds for parameters that every tensor-parallel rank holds whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lightning_mimo.errors import ReplicaError
from lightning_mimo.mimo.model import RaggedMimoModel
from lightning_mimo.mimo.parameter_names import named_parameters_of, on_any_rank
from lightning_mimo.parallel.infra import MimoModelInfra

_ABSENT = -1
_BEYOND = 2**62  # every checksum is below
_CHUNK = 2**22  # numbers of a parameter that are looked at together
# Of float64 each half, since the highest bit of 64 would be lost.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


@dataclass(frozen=True, kw_only=True)
class _Copies:
    """Parameters of one module on this rank, and the ranks that hold them too.

    Attributes:
        module: its name.
        group: the ranks that are compared.
        parameters: global name -> parameter, the same names in the same order on all of them.
        shards: shards that a parameter of these may be cut into within the group.
        shard: this rank's, of those that are cut.
    """

    module: str
    group: dist.ProcessGroup
    parameters: Mapping[str, torch.nn.Parameter]
    shards: int
    shard: int


def check_replicas(model: RaggedMimoModel, infra: MimoModelInfra) -> None:
    """Compare the weights of all modules over their replicas. Collective over the world.

    For each of a rank's modules one all-reduce of two integers for each parameter and tensor-parallel rank, and a
    second one where there are experts.

    Args:
        model: the model, wrapped or not; no weights may be on their way to this rank.
        infra: process groups.

    Raises:
        ReplicaError: on every rank, with the module, the first parameter that differs, and which ranks hold what.
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


def _copies_of(model: RaggedMimoModel, infra: MimoModelInfra, module: str) -> Iterator[_Copies]:
    groups = infra.pg_collections[module]
    dense: dict[str, torch.nn.Parameter] = {}
    experts: dict[str, torch.nn.Parameter] = {}
    for name, parameter in named_parameters_of(model, infra, module):
        (dense if getattr(parameter, "allreduce", True) else experts)[name] = parameter
    yield _Copies(
        module=module, group=groups.tp_dp_cp, parameters=dense, shards=groups.tp.size(), shard=groups.tp.rank()
    )
    # Ranks of expt_dp hold the same shard of the same experts.
    yield _Copies(module=module, group=groups.expt_dp, parameters=experts, shards=1, shard=0)


def _compare(copies: _Copies) -> dict[tuple[str, str], int]:
    """(module, name) -> this rank's checksum, of the parameters in which the ranks of the group differ."""
    if not copies.parameters or copies.group.size() == 1:
        return {}
    sums = torch.stack([checksum(parameter) for parameter in copies.parameters.values()])
    slots = torch.tensor([_slot(each, copies) for each in copies.parameters.values()], device=sums.device)
    held = sums.new_full((len(sums), copies.shards), _ABSENT)
    held.scatter_(1, slots.unsqueeze(1), sums.unsqueeze(1))
    # The largest of a checksum and of its negative: where nobody disagrees they cancel.
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


def _slot(parameter: torch.nn.Parameter, copies: _Copies) -> int:
    """Which of a parameter's shards this rank holds; the first where every rank holds the whole."""
    return copies.shard if getattr(parameter, "tensor_model_parallel", False) else 0


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A number made of all bits of a tensor and their places: int64 scalar from 0 to 2**62 - 1, on its device.

    Equal tensors have equal checksums on every device.
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in bits.split(_CHUNK):
        places = torch.arange(1, 2 * chunk.numel(), 2, device=tensor.device)
        # Sums and products of integers wrap around, so the order in which a device adds up does not matter.
        total = total * 1_000_003 + (chunk * places).sum()
    return total & (_BEYOND - 1)


def _describe(ranks: Sequence[Mapping[tuple[str, str], int]]) -> str:
    """From what each rank holds of what differs."""
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
        f"Replicas that begin apart are trained apart. Weights may depend on the seed and on their name only: load the "
        f"same file on all ranks, and draw nothing from a generator that is seeded by rank. A parameter that each "
        f"tensor-parallel rank holds a part of must be marked with tensor_model_parallel=True and its partition_dim."
    )

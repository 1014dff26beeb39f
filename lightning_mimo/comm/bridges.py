"""Bridges between modules on the same ranks that split activations at sample boundaries.

An encoder's output is flat, ``[rows, hidden]``: the concatenated embeddings of all samples of a microbatch. Samples may
have different numbers of rows (images), including 0. If the two sides have different data-parallel sizes,
megatron-core's bridges split such a tensor into equal parts or raise an error. The bridges here, and those between
disjoint ranks in ``pipeline.py``, split it at sample boundaries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core.models.mimo.comm.colocated_communicator import BridgeDirection, ColocatedBridgeCommunicator

from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.observe.spans import BACKWARD, FORWARD, SpanInfo
from lightning_mimo.parallel.infra import MimoModelInfra


class RaggedColocatedBridge(ColocatedBridgeCommunicator):
    """Bridge between modules on the same ranks that supports different numbers of rows per sample."""

    def __init__(self, infra: MimoModelInfra, module: str) -> None:
        """Collective over the world: creates process groups if the data-parallel sizes differ."""
        super().__init__(
            src_grid=infra.module_to_grid_map[module],
            dest_grid=infra.module_to_grid_map[LANGUAGE],
            src_module_name=module,
            dest_module_name=LANGUAGE,
            dim_mapping={"b": 0, "h": 1},
        )
        self._spans = infra.spans
        peers = () if self.gather_pg is None else tuple(dist.get_process_group_ranks(self.gather_pg))
        self._infos = {
            direction: SpanInfo(
                kind="bridge",
                label=f"exchange {module} -> {LANGUAGE}, {direction}",
                module=module,
                edge=f"{module} -> {LANGUAGE}",
                peers=tuple(peer for peer in peers if peer != self.current_rank),
            )
            for direction in (FORWARD, BACKWARD)
        }

    def communicate(self, tensor: torch.Tensor, rows_per_position: Sequence[int] | None = None) -> torch.Tensor:
        """Transfer an encoder's rows to the ranks whose language replica has their samples.

        Args:
            tensor: ``[rows, hidden]``, the encoder replica's output, the same on all its tensor-parallel ranks.
            rows_per_position: number of rows at each position of the global batch in the larger of this rank's two
                data-parallel shards.

        Returns:
            ``[rows, hidden]`` for the samples of this rank's language replica.
        """
        if self.direction is BridgeDirection.EQUAL:
            return tensor
        assert rows_per_position is not None, "the rows of each position must be known where dp sizes differ"
        positions = len(rows_per_position) // self.scale
        sizes = [sum(rows_per_position[i * positions : (i + 1) * positions]) for i in range(self.scale)]
        mapping = self.rank_to_src_pos if self.is_fan_in() else self.rank_to_dest_pos
        slot = mapping[self.current_rank][0] % self.scale
        function = _GatherRows if self.is_fan_in() else _TakeRows
        return function.apply(tensor, sizes, slot, self._gather)

    def _gather(self, tensor: torch.Tensor, sizes: list[int], direction: str) -> torch.Tensor:
        with self._spans.span(self._infos[direction]):
            return _all_gather_rows(tensor, sizes, self.gather_pg)


Gather = Callable[[torch.Tensor, list[int], str], torch.Tensor]
"""``(rows, rows of each member, direction)`` -> the rows of all members of a group."""


class _GatherRows(torch.autograd.Function):
    """Gather the rows of all group members, in group order; backward keeps the gradient of this member's rows."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, sizes: list[int], slot: int, gather: Gather) -> torch.Tensor:
        ctx.start, ctx.length = sum(sizes[:slot]), sizes[slot]
        return gather(tensor, sizes, FORWARD)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient.narrow(0, ctx.start, ctx.length).contiguous(), None, None, None


class _TakeRows(torch.autograd.Function):
    """Keep this member's rows; backward gathers the gradients of the rows of all members."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, sizes: list[int], slot: int, gather: Gather) -> torch.Tensor:
        ctx.sizes, ctx.gather = sizes, gather
        return tensor.narrow(0, sum(sizes[:slot]), sizes[slot]).contiguous()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return ctx.gather(gradient, ctx.sizes, BACKWARD), None, None, None


def _all_gather_rows(tensor: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate the tensors of all group members, which may have different lengths.

    They are padded to the longest, because neither gloo nor NCCL gathers uneven parts in a single call.
    """
    longest = max(sizes)
    if longest == 0:
        return tensor.new_empty((0, tensor.size(1)))
    padded = torch.nn.functional.pad(tensor, (0, 0, 0, longest - tensor.size(0))).contiguous()
    gathered = tensor.new_empty((len(sizes) * longest, tensor.size(1)))
    dist.all_gather_into_tensor(gathered, padded, group=group)
    return torch.cat([gathered[i * longest : i * longest + size] for i, size in enumerate(sizes)])

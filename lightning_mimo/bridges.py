"""Bridges between modules on the same ranks that keep every sample's rows together, and the numbers of those rows.

An encoder's output is flat, ``[rows, hidden]``: the embeddings of all samples of a microbatch, one after the other,
and samples may have different numbers of rows (images), 0 included. megatron-core's bridges cut such a tensor into
equal parts, or refuse, where the two sides have different data-parallel sizes. Those here, and in ``pipeline.py`` those
between ranks of their own, cut it at sample borders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.models.mimo.comm.colocated_communicator import BridgeDirection, ColocatedBridgeCommunicator

from lightning_mimo.infra import MimoModelInfra
from lightning_mimo.parallelism import LANGUAGE
from lightning_mimo.spans import BACKWARD, FORWARD, Work


@dataclass(frozen=True, kw_only=True)
class ModalityCounts:
    """How many embeddings each sample of a microbatch is to get from one encoder. Plain numbers, no tensors.

    Attributes:
        sample_indices: index in the dataset of every sample that the bridge of this rank sees.
        placeholders: placeholder tokens in each of these samples, the number of embeddings it must get.
        own: which of these samples this rank's encoder replica encodes.
        items: images, clips, … of each of the encoder's own samples. Later pipeline stages of an encoder, which load
            none, are told them with the first activations.
    """

    sample_indices: tuple[int, ...]
    placeholders: tuple[int, ...]
    own: range
    items: tuple[int, ...]

    @property
    def own_placeholders(self) -> tuple[int, ...]:
        return self.placeholders[self.own.start : self.own.stop]

    def to(self, *args: object, **kwargs: object) -> ModalityCounts:
        """Itself: Lightning moves whatever has ``to`` and would refuse a frozen dataclass without it."""
        return self

    def check_rows(self, module: str, rows: int, *, uniform: bool) -> None:
        """Check the encoder's output against the placeholders.

        Args:
            module: name of the encoder, for the message.
            rows: embeddings that the encoder made for its own samples together.
            uniform: whether it makes the same number of every item, so that each sample can be checked; else only the
                sum can.

        Raises:
            ValueError: naming the first sample whose numbers differ, or all samples where only the sum is known.
        """
        per_item = rows // sum(self.items) if sum(self.items) else 0
        indices = self.sample_indices[self.own.start : self.own.stop]
        for index, placeholders, items in zip(indices, self.own_placeholders, self.items, strict=True):
            if uniform and placeholders != items * per_item:
                raise ValueError(
                    f"Sample {index}: input_ids has {placeholders} placeholder tokens for {module!r}, but its {items} "
                    f"inputs give {items * per_item} embeddings ({per_item} each). Write {items * per_item} "
                    f"placeholder tokens into this sample, or give it as many inputs as it has placeholders for."
                )
        if rows != sum(self.own_placeholders):
            raise ValueError(
                f"Samples {list(indices)}: input_ids has {sum(self.own_placeholders)} placeholder tokens for "
                f"{module!r}, but the encoder made {rows} embeddings. One placeholder must stand for each embedding."
            )


class SampleAlignedColocatedBridge(ColocatedBridgeCommunicator):
    """A bridge between modules on the same ranks, for different numbers of rows per sample."""

    def __init__(self, infra: MimoModelInfra, module: str) -> None:
        """Collective over the world: creates a group where the data-parallel sizes differ."""
        super().__init__(
            src_grid=infra.module_to_grid_map[module],
            dest_grid=infra.module_to_grid_map[LANGUAGE],
            src_module_name=module,
            dest_module_name=LANGUAGE,
            dim_mapping={"b": 0, "h": 1},
        )
        self._spans = infra.spans
        peers = () if self.gather_pg is None else tuple(dist.get_process_group_ranks(self.gather_pg))
        self._works = {
            direction: Work(
                kind="bridge",
                words=f"exchange {module} -> {LANGUAGE}, {direction}",
                module=module,
                edge=f"{module} -> {LANGUAGE}",
                peers=tuple(peer for peer in peers if peer != self.current_rank),
            )
            for direction in (FORWARD, BACKWARD)
        }

    def communicate(self, tensor: torch.Tensor, rows_per_sample: Sequence[int] | None = None) -> torch.Tensor:
        """Bring an encoder's rows to the ranks whose language replica holds their samples.

        Args:
            tensor: ``[rows, hidden]``, the encoder replica's output, the same on all its tensor-parallel ranks.
            rows_per_sample: rows of every sample that the larger of the two shards of this rank holds.

        Returns:
            ``[rows, hidden]`` for the samples of this rank's language replica.
        """
        if self.direction is BridgeDirection.EQUAL:
            return tensor
        assert rows_per_sample is not None, "the rows of each sample must be known where dp sizes differ"
        samples = len(rows_per_sample) // self.scale
        sizes = [sum(rows_per_sample[i * samples : (i + 1) * samples]) for i in range(self.scale)]
        mapping = self.rank_to_src_pos if self.is_fan_in() else self.rank_to_dest_pos
        slot = mapping[self.current_rank][0] % self.scale
        function = _GatherRows if self.is_fan_in() else _TakeRows
        return function.apply(tensor, sizes, slot, self._gather)

    def _gather(self, tensor: torch.Tensor, sizes: list[int], direction: str) -> torch.Tensor:
        with self._spans.span(self._works[direction]):
            return _all_gather_rows(tensor, sizes, self.gather_pg)


Gather = Callable[[torch.Tensor, list[int], str], torch.Tensor]
"""``(rows, rows of each member, direction)`` -> the rows of all members of a group."""


class _GatherRows(torch.autograd.Function):
    """Rows of all members of a group, in group order; backward keeps this member's."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, sizes: list[int], slot: int, gather: Gather) -> torch.Tensor:
        ctx.start, ctx.length = sum(sizes[:slot]), sizes[slot]
        return gather(tensor, sizes, FORWARD)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient.narrow(0, ctx.start, ctx.length).contiguous(), None, None, None


class _TakeRows(torch.autograd.Function):
    """This member's rows; backward collects the gradients of the rows that the other members took."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, sizes: list[int], slot: int, gather: Gather) -> torch.Tensor:
        ctx.sizes, ctx.gather = sizes, gather
        return tensor.narrow(0, sum(sizes[:slot]), sizes[slot]).contiguous()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return ctx.gather(gradient, ctx.sizes, BACKWARD), None, None, None


def _all_gather_rows(tensor: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate differently long tensors of a group. Padded to the longest, because neither gloo nor NCCL gathers
    uneven parts in one call."""
    longest = max(sizes)
    if longest == 0:
        return tensor.new_empty((0, tensor.size(1)))
    padded = torch.nn.functional.pad(tensor, (0, 0, 0, longest - tensor.size(0))).contiguous()
    gathered = tensor.new_empty((len(sizes) * longest, tensor.size(1)))
    dist.all_gather_into_tensor(gathered, padded, group=group)
    return torch.cat([gathered[i * longest : i * longest + size] for i, size in enumerate(sizes)])

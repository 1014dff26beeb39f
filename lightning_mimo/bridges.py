"""Bridges from an encoder's ranks to the language module's ranks that keep every sample's rows together.

An encoder's output is flat, ``[rows, hidden]``: the embeddings of all samples of a microbatch, one after the other,
and samples may have different numbers of rows (images), 0 included. megatron-core's bridges cut such a tensor into
equal parts, or refuse, where the two sides have different data-parallel sizes. Those here cut it at sample borders.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.mimo.comm.colocated_communicator import BridgeDirection, ColocatedBridgeCommunicator
from megatron.core.pipeline_parallel.bridge_communicator import CommRole
from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator

from lightning_mimo.infra import MimoModelInfra
from lightning_mimo.parallelism import LANGUAGE
from lightning_mimo.spans import BACKWARD, FORWARD, Spans, Work
from lightning_mimo.transfers import RecordedBridge, RecordedP2P


@dataclass(frozen=True, kw_only=True)
class ModalityCounts:
    """How many embeddings each sample of a microbatch is to get from one encoder. Plain numbers, no tensors.

    Attributes:
        sample_indices: index in the dataset of every sample that the bridge of this rank sees.
        placeholders: placeholder tokens in each of these samples, the number of embeddings it must get.
        own: which of these samples this rank's encoder replica encodes.
        items: images, clips, … of each of the encoder's own samples.
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


class SampleAlignedBridge(RecordedBridge):
    """A bridge between disjoint ranks that returns each encoder replica the gradient of just its own rows.

    Upstream splits the gradient into equal parts on the way back. Here the receiver remembers how many rows came from
    each sender; microbatches come back in the order in which they went, so a queue is enough. Nothing comes back to an
    encoder that is frozen.
    """

    def __init__(self, *args, **kwargs) -> None:
        self._received_rows: deque[list[int]] = deque()
        self._one_way = False
        super().__init__(*args, **kwargs)

    def send_no_gradients(self) -> None:
        """From now on, let activations through only. To be called on both sides."""
        self._one_way = True

    def reset(self) -> None:
        """Forget what was received: a forward-only pass sends nothing back."""
        super().reset()
        self._received_rows.clear()

    # Upstream receives into tensors that autograd follows, so backward would run through torch's broadcast, which has
    # no derivative (torch warns of it). What comes in is where this rank's graph begins.

    @torch.no_grad()
    def recv_forward(self) -> torch.Tensor | None:
        return _begin_graph(super().recv_forward())

    @torch.no_grad()
    def send_backward_recv_forward(self, grad_tensor: torch.Tensor, forward_shape=None) -> torch.Tensor | None:
        if self._one_way:
            return self.recv_forward()
        return _begin_graph(super().send_backward_recv_forward(grad_tensor, forward_shape))

    def send_forward_recv_backward(self, input_tensor: torch.Tensor, grad_shape=None) -> torch.Tensor | None:
        if self._one_way:
            return self.send_forward(input_tensor)
        return super().send_forward_recv_backward(input_tensor, grad_shape)

    def send_backward(self, grad_tensor: torch.Tensor) -> None:
        if not self._one_way:
            super().send_backward(grad_tensor)

    def recv_backward(self) -> torch.Tensor | None:
        return None if self._one_way else super().recv_backward()

    def _communicate_shapes(self, *args, **kwargs):
        forward_shapes, gradient_shapes = super()._communicate_shapes(*args, **kwargs)
        if forward_shapes:
            self._received_rows.append([shape[self._batch_dim] for shape in forward_shapes])
        return forward_shapes, gradient_shapes

    def _split_tensor_at_batch_dim(self, aggregated_tensor: torch.Tensor, num_splits: int) -> list[torch.Tensor]:
        if self.comm_map[self.current_rank].role is CommRole.RECEIVER:
            rows = self._received_rows.popleft()
            return [part.contiguous() for part in aggregated_tensor.split(rows, dim=self._batch_dim)]
        return super()._split_tensor_at_batch_dim(aggregated_tensor, num_splits)


class OneWayP2P(RecordedP2P):
    """Between pipeline stages of one module, where gradients of frozen stages do not travel back."""

    def __init__(
        self,
        pp_group: dist.ProcessGroup,
        config: ModelParallelConfig,
        *,
        to_previous: bool,
        to_next: bool,
        spans: Spans,
        module: str,
    ):
        """
        Args:
            pp_group: the module's pipeline stages.
            config: as for upstream's.
            to_previous: whether gradients go to the stage before.
            to_next: whether gradients come from the stage after.
            spans: where transfers are recorded.
            module: its name.
        """
        super().__init__(pp_group, config, spans=spans, module=module)
        self._to_previous = to_previous
        self._to_next = to_next

    def recv_backward(self, tensor_shapes, is_last_stage: bool):
        return super().recv_backward(tensor_shapes, is_last_stage) if self._to_next else None

    def send_backward(self, input_tensor_grads, is_first_stage: bool) -> None:
        if self._to_previous:
            super().send_backward(input_tensor_grads, is_first_stage)

    def send_forward_recv_backward(self, output_tensors, tensor_shapes, is_last_stage: bool):
        if self._to_next:
            return super().send_forward_recv_backward(output_tensors, tensor_shapes, is_last_stage)
        return self.send_forward(output_tensors, is_last_stage)

    def send_backward_recv_forward(self, input_tensor_grads, tensor_shapes, is_first_stage: bool):
        if self._to_previous:
            return super().send_backward_recv_forward(input_tensor_grads, tensor_shapes, is_first_stage)
        return self.recv_forward(tensor_shapes, is_first_stage)


def _begin_graph(received: torch.Tensor | None) -> torch.Tensor | None:
    return None if received is None else received.detach().requires_grad_()


class MimoPipelineCommunicator(MultiModulePipelineCommunicator):
    """Pipeline communicator over the modules of a non-colocated layout, with sample-aligned bridges.

    Collective over the world to build, and its groups belong to megatron-core's class-level cache, which
    ``MimoModelInfra.destroy`` empties.
    """

    def __init__(self, infra: MimoModelInfra, config: ModelParallelConfig) -> None:
        """Build the bridges of all encoders.

        Args:
            infra: grids and topology.
            config: the language module's config; ``pipeline_dtype`` is the dtype on the wire.
        """
        self._stages = {name: sizes.pp for name, sizes in infra.layout.modules.items()}
        self._spans = infra.spans
        super().__init__(
            infra.module_to_grid_map,
            infra.topology,
            config,
            dim_mapping={"s": 0, "b": 1, "h": 2},
            module_output_ndim=dict.fromkeys(infra.layout.encoders, 2),
        )

    @property
    def current_stage(self) -> int:
        """This rank's stage, counted from the end of the pipeline, where all modules meet.

        Upstream counts from the beginning, so that an encoder with fewer stages than another would run ahead of it by
        the difference and then wait for the language module, which waits for it: with gloo neither ever goes on.
        """
        name, place = next(iter(self.rank_module_map.items()))
        behind = place.pp_size - 1 - place.pp_rank + (0 if name == LANGUAGE else self._stages[LANGUAGE])
        return self.total_stages - 1 - behind

    def restrict(self, needs_gradient: Callable[[str, int], bool]) -> None:
        """Send gradients back only where somebody needs them. To be called on every rank.

        Args:
            needs_gradient: ``(module, pipeline stage)`` -> whether the output of that stage needs a gradient.
        """
        for bridge in self.bridge_comms:
            if not needs_gradient(bridge.src_module_name, self._stages[bridge.src_module_name] - 1):
                bridge.send_no_gradients()
        for name, rank in self.rank_module_map.items():
            rank.p2p_communicator = OneWayP2P(
                self.module_to_grid_map[name].get_pg("pp"),
                self.config,
                to_previous=rank.pp_rank > 0 and needs_gradient(name, rank.pp_rank - 1),
                to_next=needs_gradient(name, rank.pp_rank),
                spans=self._spans,
                module=name,
            )

    def _build_bridge_comms(self) -> None:
        for source, destinations in self.topology.items():
            for destination in destinations:
                self.bridge_comms.append(
                    SampleAlignedBridge(
                        src_grid=self.module_to_grid_map[source],
                        dest_grid=self.module_to_grid_map[destination],
                        dim_mapping=self.dim_mapping,
                        comm_dtype=self.config.pipeline_dtype,
                        src_module_name=source,
                        dest_module_name=destination,
                        tensor_ndim=self.module_output_ndim[source],
                        spans=self._spans,
                    )
                )

    def reset(self) -> None:
        """Forget what a forward-only pass left behind. Call it before every pass."""
        for bridge in self.bridge_comms:
            bridge.reset()
        for rank in self.rank_module_map.values():
            rank.p2p_communicator.reset()


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

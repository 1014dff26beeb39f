"""Spans around what goes over the edges between modules and between pipeline stages."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator, CommRole
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from lightning_mimo.spans import BACKWARD, FORWARD, Spans, Work


class Port:
    """This rank's end of an edge. Numbers the microbatches that pass in each direction."""

    def __init__(
        self, spans: Spans, *, kind: str, module: str, edge: str, peers: Sequence[int], sends: bool = True
    ) -> None:
        """
        Args:
            spans: where transfers are recorded.
            kind: ``bridge`` or ``pipeline``.
            module: of this rank.
            edge: in words, in the direction of the forward pass.
            peers: global ranks at the other end.
            sends: whether this rank sends; else it only gets a copy of what one of its peers received.
        """
        self._spans = spans
        self._kind, self._module, self._edge, self._peers = kind, module, edge, tuple(peers)
        self._sends = sends
        self._works: dict[tuple[str | None, str | None], Work] = {}
        self._numbers: Counter[str] = Counter()

    def reset(self) -> None:
        """The next microbatch is the first again."""
        self._numbers.clear()

    def transfer(
        self, *, sends: str | None = None, receives: str | None = None
    ) -> contextlib.AbstractContextManager[Any]:
        """A span around one transfer.

        Args:
            sends: ``forward`` or ``backward``, the direction of what is sent.
            receives: the direction of what is received.
        """
        sends = sends if self._sends else None
        if sends is None and receives is None:
            return contextlib.nullcontext()
        # Each direction goes over this edge one way only, so it may count for sent and received alike.
        sent = None if sends is None else self._next(sends)
        received = None if receives is None else self._next(receives)
        work = self._works.get((sends, receives)) or self._describe(sends, receives)
        return self._spans.span(work, received if sent is None else sent, received=received)

    def _next(self, direction: str) -> int:
        self._numbers[direction] += 1
        return self._numbers[direction] - 1

    def _describe(self, sends: str | None, receives: str | None) -> Work:
        verb, direction = ("send", sends) if sends else ("receive", receives)
        also = f", and receive {receives}" if sends and receives else ""
        work = self._works[sends, receives] = Work(
            kind=self._kind,
            words=f"{verb} {self._edge}, {direction}{also}",
            module=self._module,
            sends=sends,
            receives=receives,
            edge=self._edge,
            peers=self._peers,
        )
        return work


class RecordedBridge(BridgeCommunicator):
    """A bridge whose transfers are spans."""

    def __init__(self, *args: Any, spans: Spans, **kwargs: Any) -> None:
        """
        Args:
            args: of BridgeCommunicator.
            spans: where transfers are recorded.
            kwargs: of BridgeCommunicator.
        """
        super().__init__(*args, **kwargs)
        is_source = self.is_current_rank_in_grid(self.src_grid)
        place = self.comm_map.get(self.current_rank)
        role = None if place is None else place.role
        if role in (CommRole.SENDER, CommRole.RECEIVER):
            peers = place.send_to_ranks or place.recv_from_ranks
        else:
            leader = self.src_local_leader_rank if is_source else self.dest_local_leader_rank
            peers = [] if leader is None else [leader]
        self._port = Port(
            spans,
            kind="bridge",
            module=self.src_module_name if is_source else self.dest_module_name,
            edge=f"{self.src_module_name} -> {self.dest_module_name}",
            peers=peers,
            sends=role is not CommRole.MEMBER,
        )

    def reset(self) -> None:
        """The next microbatch is the first again."""
        self._port.reset()

    def recv_forward(self) -> torch.Tensor | None:
        with self._port.transfer(receives=FORWARD):
            return super().recv_forward()

    def send_forward(self, tensor_to_send: torch.Tensor) -> None:
        with self._port.transfer(sends=FORWARD):
            super().send_forward(tensor_to_send)

    def recv_backward(self) -> torch.Tensor | None:
        with self._port.transfer(receives=BACKWARD):
            return super().recv_backward()

    def send_backward(self, grad_tensor: torch.Tensor) -> None:
        with self._port.transfer(sends=BACKWARD):
            super().send_backward(grad_tensor)

    def send_forward_recv_backward(self, input_tensor: torch.Tensor, grad_shape: Any = None) -> torch.Tensor | None:
        with self._port.transfer(sends=FORWARD, receives=BACKWARD):
            return super().send_forward_recv_backward(input_tensor, grad_shape)

    def send_backward_recv_forward(self, grad_tensor: torch.Tensor, forward_shape: Any = None) -> torch.Tensor | None:
        with self._port.transfer(sends=BACKWARD, receives=FORWARD):
            return super().send_backward_recv_forward(grad_tensor, forward_shape)


class RecordedP2P(P2PCommunicator):
    """Between pipeline stages of one module, with spans around the transfers."""

    def __init__(self, pp_group: dist.ProcessGroup, config: ModelParallelConfig, *, spans: Spans, module: str) -> None:
        """
        Args:
            pp_group: the module's pipeline stages.
            config: as for upstream's.
            spans: where transfers are recorded.
            module: its name.
        """
        super().__init__(pp_group, config)
        ranks, stage = dist.get_process_group_ranks(pp_group), pp_group.rank()
        self._ports = [
            Port(
                spans,
                kind="pipeline",
                module=module,
                edge=f"{module} stage {first} -> {first + 1}",
                peers=[ranks[other]] if 0 <= other < len(ranks) else [],
            )
            for first, other in ((stage - 1, stage - 1), (stage, stage + 1))
        ]

    def reset(self) -> None:
        """The next microbatch is the first again."""
        for port in self._ports:
            port.reset()

    def recv_forward(self, tensor_shapes: Any, is_first_stage: bool) -> Any:
        with self._ports[0].transfer(receives=FORWARD):
            return super().recv_forward(tensor_shapes, is_first_stage)

    def send_forward(self, output_tensors: Any, is_last_stage: bool) -> None:
        with self._ports[1].transfer(sends=FORWARD):
            super().send_forward(output_tensors, is_last_stage)

    def recv_backward(self, tensor_shapes: Any, is_last_stage: bool) -> Any:
        with self._ports[1].transfer(receives=BACKWARD):
            return super().recv_backward(tensor_shapes, is_last_stage)

    def send_backward(self, input_tensor_grads: Any, is_first_stage: bool) -> None:
        with self._ports[0].transfer(sends=BACKWARD):
            super().send_backward(input_tensor_grads, is_first_stage)

    def send_forward_recv_backward(self, output_tensors: Any, tensor_shapes: Any, is_last_stage: bool) -> Any:
        with self._ports[1].transfer(sends=FORWARD, receives=BACKWARD):
            return super().send_forward_recv_backward(output_tensors, tensor_shapes, is_last_stage)

    def send_backward_recv_forward(self, input_tensor_grads: Any, tensor_shapes: Any, is_first_stage: bool) -> Any:
        with self._ports[0].transfer(sends=BACKWARD, receives=FORWARD):
            return super().send_backward_recv_forward(input_tensor_grads, tensor_shapes, is_first_stage)

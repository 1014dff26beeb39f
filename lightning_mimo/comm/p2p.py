"""Asynchronous point-to-point transfers between modules and between pipeline stages.

megatron-core's communicators send a shape, wait for it, send the data, wait until the data are received, and let one
rank broadcast them to its tensor-parallel peers. Here, both sides derive shapes from the batch where possible, sends do
not block, and every rank receives its data directly. On CPUs, the next receive is posted while the rank computes, so
that transfer and computation overlap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lightning_mimo.comm.first_wait import OnFirstWait
from lightning_mimo.errors import DataError
from lightning_mimo.layout.routes import Routes
from lightning_mimo.observe.spans import BACKWARD, FORWARD, SpanInfo, Spans

Shape = tuple[int, ...]
Shapes = Sequence[Shape]
"""Shapes of the parts of one microbatch; empty parts are not sent."""


@dataclass(frozen=True, kw_only=True)
class DynamicShape:
    """Marks a shape that the receiver cannot know in advance; the sender announces it before the data.

    Attributes:
        numbers: how many additional integers are announced with the shape.
    """

    numbers: int = 0


# Separate tags, because the next announcement may be posted before what follows the current one.
_DATA, _ANNOUNCEMENT, _MORE_NUMBERS = 1, 2, 3
_DIMENSIONS = 3  # of an announced tensor


@dataclass(frozen=True, kw_only=True)
class P2PLink:
    """Connection over which one rank exchanges activations and gradients with another module or stage.

    Attributes:
        kind: ``bridge`` or ``pipeline``.
        label: source and destination of the activations.
        module: module of this rank.
        routes: routes to the other side.
        dtype: dtype of the transferred tensors.
        in_flight: maximum number of microbatches whose activations are sent but not received; a further send waits.
        gradients_in_flight: the same for gradients.
        forward_group: process group of all ranks, for activations only.
        backward_group: process group of all ranks, for gradients only. With separate groups, NCCL orders each direction
            independently, and neither waits for the other.
        announcement_group: process group of all ranks for tensors on the CPU. Hosts announce shapes through it and do
            not wait for their GPUs; ``None`` if all shapes are known.
        spans: recorder of the transfers.
        on_first_wait: runs after a receive is posted and before the rank waits for it; shared by all links.
    """

    kind: str
    label: str
    module: str
    routes: Routes
    dtype: torch.dtype
    in_flight: int
    gradients_in_flight: int
    forward_group: dist.ProcessGroup
    backward_group: dist.ProcessGroup
    announcement_group: dist.ProcessGroup | None
    spans: Spans
    on_first_wait: OnFirstWait

    def group(self, direction: str, tag: int) -> dist.ProcessGroup:
        """Group for a tensor with this tag: data on the device, everything else on the CPU."""
        if tag != _DATA:
            assert self.announcement_group is not None, "all shapes are known"
            return self.announcement_group
        return self.forward_group if direction == FORWARD else self.backward_group

    def span_info(self, verb: str, direction: str, peers: Sequence[int]) -> SpanInfo:
        return SpanInfo(
            kind=self.kind,
            label=f"{verb} {self.label}, {direction}",
            module=self.module,
            sends=direction if verb == "send" else None,
            receives=direction if verb == "receive" else None,
            edge=self.label,
            peers=tuple(peers),
        )


class SendChannel:
    """Sends microbatches in order, and keeps their tensors until they are received.

    Attributes:
        numbers: integers to announce with the next dynamic shape.
        more_numbers: a variable number of further integers, sent after the data.
    """

    def __init__(self, link: P2PLink, direction: str) -> None:
        self._link = link
        self._info = link.span_info("send", direction, link.routes.receivers)
        self._waiting = link.span_info("finish sending", direction, link.routes.receivers)
        self._direction = direction
        self._in_flight = link.in_flight if direction == FORWARD else link.gradients_in_flight
        self._flying: deque[list[tuple[dist.Work, torch.Tensor]]] = deque()
        self._shapes: Sequence[Shapes | DynamicShape | None] = ()
        self._number = 0
        self.numbers: tuple[int, ...] = ()
        self.more_numbers: tuple[int, ...] = ()

    def expect(self, shapes: Sequence[Shapes | DynamicShape | None]) -> None:
        """Begin a pass.

        Args:
            shapes: shapes of each microbatch; ``None`` if the other side knows the shape of what is sent.
        """
        assert not self._flying, "the pass before was not finished"
        self._shapes, self._number = shapes, 0

    def send(self, tensor: torch.Tensor) -> None:
        """Send the next microbatch asynchronously.

        Args:
            tensor: its parts, concatenated along the first dimension.

        Raises:
            DataError: if the tensor does not have the shape that the other side expects.
        """
        if not self._info.peers:
            return
        if len(self._flying) >= self._in_flight:
            self._wait_for_oldest()
        with self._link.spans.span(self._info, self._number):
            shapes = self._shapes[self._number]
            if isinstance(shapes, DynamicShape):
                assert len(self.numbers) == shapes.numbers, "the other side expects a different number of integers"
                self._flying.append(self._announced(tensor))
            else:
                self._flying.append(self._parts(tensor, [tuple(tensor.shape)] if shapes is None else shapes))
        self._number += 1

    def let_go(self, number: int) -> None:
        """Keep the tensors of a microbatch and of those before it no longer, because the other side has them."""
        while self._flying and self._number - len(self._flying) <= number:
            self._wait_for_oldest()

    def finish(self) -> None:
        """End the pass: wait until everything has been received."""
        while self._flying:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        with self._link.spans.span(self._waiting, self._number - len(self._flying)):
            for work, _ in self._flying.popleft():
                work.wait()

    def _parts(self, tensor: torch.Tensor, shapes: Shapes) -> list[tuple[dist.Work, torch.Tensor]]:
        whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if tuple(tensor.shape) != whole:
            raise DataError(
                f"{self._link.label}: the tensor sent by module {self._link.module!r} has shape {tuple(tensor.shape)}, "
                f"but the other side expects {whole} for this microbatch. Return one row of hidden_size values for "
                f"each placeholder token; between pipeline stages of the language module, (sequence, batch, hidden)."
            )
        parts = _alone(tensor.detach()).split([shape[0] for shape in shapes])
        return [
            self._post(part.contiguous(), peer, _DATA)
            for part, peers in zip(parts, self._link.routes.sends, strict=True)
            for peer in peers
            if part.numel()
        ]

    def _announced(self, tensor: torch.Tensor) -> list[tuple[dist.Work, torch.Tensor]]:
        assert tensor.ndim == _DIMENSIONS and self._link.routes.parts == 1
        announcement = torch.tensor([*tensor.shape, len(self.more_numbers), *self.numbers], device="cpu")
        more = torch.tensor(self.more_numbers, dtype=torch.int64, device="cpu")
        posted = []
        for peer in self._info.peers:
            posted.append(self._post(announcement, peer, _ANNOUNCEMENT))
            if more.numel():
                posted.append(self._post(more, peer, _MORE_NUMBERS))
            if tensor.numel():
                posted.append(self._post(_alone(tensor.detach()).contiguous(), peer, _DATA))
        return posted

    def _post(self, tensor: torch.Tensor, peer: int, tag: int) -> tuple[dist.Work, torch.Tensor]:
        work = dist.isend(tensor, dst=peer, group=self._link.group(self._direction, tag), tag=tag)
        assert work is not None, "this rank is in the group"
        return work, tensor


class ReceiveChannel:
    """Receives microbatches in order.

    Attributes:
        received: number of microbatches of this pass that were received.
        numbers: integers that were announced with the last dynamic shape.
        more_numbers: further integers that followed the data.
    """

    def __init__(self, link: P2PLink, direction: str) -> None:
        self._link = link
        self._info = link.span_info("receive", direction, link.routes.receives)
        self._direction = direction
        # NCCL's receives occupy the device until the data arrive.
        self._ahead = 1 if dist.get_backend(link.group(direction, _DATA)) == "gloo" else 0
        self._posted: deque[tuple[list[torch.Tensor], list[dist.Work]]] = deque()
        self._shapes: list[Shapes | DynamicShape | None] = []
        self.received = 0
        self.numbers: tuple[int, ...] = ()
        self.more_numbers: tuple[int, ...] = ()

    def expect(self, shapes: Sequence[Shapes | DynamicShape | None]) -> None:
        """Begin a pass that receives all of these microbatches.

        Args:
            shapes: shapes of each microbatch; ``None`` if :meth:`set_shape` gives them before it is received.
        """
        assert not self._posted, "the pass before was not finished"
        self._shapes, self.received = list(shapes), 0
        self._post_up_to(self._ahead)

    def set_shape(self, shape: Shape) -> None:
        """Set the shape of the first microbatch whose shape is not known."""
        if None in self._shapes:
            self._shapes[self._shapes.index(None)] = [shape]

    def receive(self) -> torch.Tensor:
        """Return the next microbatch, with its parts concatenated along the first dimension. Waits for the data."""
        with self._link.spans.span(self._info, self.received):
            self._post_up_to(self.received + 1 + self._ahead)
            parts, works = self._posted.popleft()
            self._link.on_first_wait.do()
            for work in works:
                work.wait()
            if isinstance(self._shapes[self.received], DynamicShape):
                parts = [self._receive_announced(*parts)]
        self.received += 1
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _post_up_to(self, end: int) -> None:
        for shapes in self._shapes[self.received + len(self._posted) : end]:
            if shapes is None:
                return
            self._posted.append(self._post(shapes))

    def _post(self, shapes: Shapes | DynamicShape) -> tuple[list[torch.Tensor], list[dist.Work]]:
        device = torch.cuda.current_device()
        if isinstance(shapes, DynamicShape):
            size = _DIMENSIONS + 1 + shapes.numbers
            parts, tag = [torch.empty(size, dtype=torch.int64, device="cpu")], _ANNOUNCEMENT
        else:
            parts, tag = [torch.empty(shape, dtype=self._link.dtype, device=device) for shape in shapes], _DATA
        peers = zip(parts, self._link.routes.receives, strict=True)
        return parts, [self._irecv(part, peer, tag) for part, peer in peers if part.numel()]

    def _irecv(self, part: torch.Tensor, peer: int, tag: int) -> dist.Work:
        work = dist.irecv(part, src=peer, group=self._link.group(self._direction, tag), tag=tag)
        assert work is not None, "this rank is in the group"
        return work

    def _receive_announced(self, announcement: torch.Tensor) -> torch.Tensor:
        told = announcement.tolist()
        shape, size, self.numbers = told[:_DIMENSIONS], told[_DIMENSIONS], tuple(told[_DIMENSIONS + 1 :])
        part = torch.empty(shape, dtype=self._link.dtype, device=torch.cuda.current_device())
        more = torch.empty(size, dtype=torch.int64, device="cpu")
        for each, tag in ((more, _MORE_NUMBERS), (part, _DATA)):
            if each.numel():
                self._irecv(each, self._info.peers[0], tag).wait()
        self.more_numbers = tuple(more.tolist()) if size else ()
        return part


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor that is a small part of its storage, all of which would be kept until it is received.

    Example: the gradient of the embeddings of images is a part of the gradient of all embeddings.
    """
    return tensor.clone() if tensor.untyped_storage().nbytes() >= 2 * tensor.nbytes else tensor


def _backward_shapes(shapes: Sequence[Shapes | DynamicShape]) -> list[Shapes | None]:
    """Return the shapes of the gradients: those of the activations, which both sides know by then."""
    return [None if isinstance(each, DynamicShape) else each for each in shapes]


class Sender:
    """Sending end of a link: sends activations, and receives their gradients if they are needed.

    Implements the methods of megatron-core's BridgeCommunicator that its MultiModulePipelineCommunicator calls on the
    sending side.
    """

    def __init__(self, link: P2PLink, *, source: str, gradients: bool) -> None:
        """
        Args:
            link: link to the other side.
            source: module of the activations, which megatron-core uses as the key of the tensors.
            gradients: whether gradients are sent back; must be the same on both sides.
        """
        self.src_module_name = source
        self._forward = SendChannel(link, FORWARD)
        self._backward = ReceiveChannel(link, BACKWARD) if gradients else None

    def expect(self, shapes: Sequence[Shapes | DynamicShape], *, forward_only: bool) -> None:
        """Begin a pass with microbatches of these shapes."""
        self._forward.expect(shapes)
        if self._backward is not None:
            self._backward.expect([] if forward_only else _backward_shapes(shapes))

    def finish(self) -> None:
        """End the pass."""
        self._forward.finish()

    def tell(self, numbers: tuple[int, ...], more: tuple[int, ...] = ()) -> None:
        """Set the integers to send with the next activations, if their shape is announced.

        Args:
            numbers: as many integers as the other side expects.
            more: any number of further integers.
        """
        self._forward.numbers, self._forward.more_numbers = numbers, more

    def send_forward(self, activations: torch.Tensor) -> None:
        if self._backward is not None:
            self._backward.set_shape(tuple(activations.shape))
        self._forward.send(activations)

    def recv_backward(self) -> torch.Tensor | None:
        if self._backward is None:
            return None
        gradients = self._backward.receive()
        self._forward.let_go(self._backward.received - 1)
        return gradients

    def send_forward_recv_backward(self, activations: torch.Tensor) -> torch.Tensor | None:
        self.send_forward(activations)
        return self.recv_backward()


class Receiver:
    """Receiving end of a link: receives activations, and sends back their gradients if they are needed."""

    def __init__(self, link: P2PLink, *, source: str, gradients: bool) -> None:
        """Arguments as for :class:`Sender`; ``source`` is the module that sends the activations."""
        self.src_module_name = source
        self._forward = ReceiveChannel(link, FORWARD)
        self._backward = SendChannel(link, BACKWARD) if gradients else None

    def expect(self, shapes: Sequence[Shapes | DynamicShape], *, forward_only: bool) -> None:
        """Begin a pass with microbatches of these shapes."""
        self._forward.expect(shapes)
        if self._backward is not None:
            self._backward.expect([] if forward_only else _backward_shapes(shapes))

    def finish(self) -> None:
        """End the pass."""
        if self._backward is not None:
            self._backward.finish()

    @property
    def told(self) -> tuple[int, ...]:
        """Integers that were received with the last activations, if their shape was announced."""
        return self._forward.numbers

    @property
    def told_more(self) -> tuple[int, ...]:
        """Further integers that were received with the last activations."""
        return self._forward.more_numbers

    def recv_forward(self) -> torch.Tensor:
        # The autograd graph of this rank begins here.
        return self._forward.receive().requires_grad_()

    def send_backward(self, gradients: torch.Tensor) -> None:
        if self._backward is not None:
            self._backward.send(gradients)

    def send_backward_recv_forward(self, gradients: torch.Tensor) -> torch.Tensor:
        self.send_backward(gradients)
        return self.recv_forward()

"""What goes over the edges between modules and between pipeline stages: nobody waits for a send.

megatron-core's communicators tell the other side a shape, wait until it is there, send, wait until that is received,
and let one rank pass it on to its tensor-parallel peers. Here shapes are known from the batch on both sides wherever
they can be, a sender goes on at once, every rank gets what it needs directly, and on CPUs the next receive is posted
while the rank still computes, so that data move in the meantime.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lightning_mimo.errors import DataError
from lightning_mimo.layout.routes import Routes
from lightning_mimo.observe.spans import BACKWARD, FORWARD, SpanInfo, Spans

Shape = tuple[int, ...]
Shapes = Sequence[Shape]
"""Of the parts of one microbatch; what is empty is not sent."""


@dataclass(frozen=True, kw_only=True)
class DynamicShape:
    """Stands for the shape of a microbatch that the other side cannot know: it is told.

    Attributes:
        numbers: how many numbers it is told with the shape.
    """

    numbers: int = 0


_DATA, _ANNOUNCEMENT = 1, 2  # tags: a receive of the latter may be posted ahead of one of the former
_DIMENSIONS = 3  # of what is announced


class OnFirstWait:
    """What a rank does once in a training pass, before it waits for what it receives first."""

    def __init__(self, action: Callable[[], None] | None = None) -> None:
        """
        Args:
            action: must not raise, and must not wait for other ranks; ``None`` does nothing.
        """
        self._action = action
        self._is_due = False

    def begin(self, *, is_due: bool) -> None:
        """A pass begins, in which it is to be done or not."""
        self._is_due = is_due

    def do(self) -> None:
        """Do it, if that is due and has not been done."""
        if self._is_due and self._action is not None:
            self._is_due = False
            self._action()


@dataclass(frozen=True, kw_only=True)
class P2PLink:
    """Two sides that exchange activations and gradients, seen from one rank.

    Attributes:
        kind: ``bridge`` or ``pipeline``.
        label: from where to where activations go.
        module: of this rank.
        routes: to the other side.
        dtype: on the wire.
        in_flight: microbatches that may have been sent and not received; a sender that would exceed it waits.
        forward_group: has all ranks; only activations go over it.
        backward_group: has all ranks; only gradients go over it. With groups of their own, the two directions keep
            their own order in NCCL, and none waits behind the other.
        spans: where transfers are recorded.
        on_first_wait: done after a receive has been posted, where the rank would wait for it; shared by all links.
    """

    kind: str
    label: str
    module: str
    routes: Routes
    dtype: torch.dtype
    in_flight: int
    forward_group: dist.ProcessGroup
    backward_group: dist.ProcessGroup
    spans: Spans
    on_first_wait: OnFirstWait

    def group(self, direction: str) -> dist.ProcessGroup:
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
    """Sends one microbatch after the other, and keeps what is on its way.

    Attributes:
        numbers: that are told with the next shape that is announced.
    """

    def __init__(self, link: P2PLink, direction: str) -> None:
        self._link = link
        self._info = link.span_info("send", direction, link.routes.receivers)
        self._waiting = link.span_info("finish sending", direction, link.routes.receivers)
        self._group = link.group(direction)
        self._flying: deque[list[tuple[dist.Work, torch.Tensor]]] = deque()
        self._shapes: Sequence[Shapes | DynamicShape] = ()
        self._number = 0
        self.numbers: tuple[int, ...] = ()

    def expect(self, shapes: Sequence[Shapes | DynamicShape]) -> None:
        """Begin a pass.

        Args:
            shapes: of every microbatch.
        """
        assert not self._flying, "the pass before was not finished"
        self._shapes, self._number = shapes, 0

    def send(self, tensor: torch.Tensor) -> None:
        """Send the next microbatch, and do not wait for it.

        Args:
            tensor: its parts one after the other, cut in the first dimension.

        Raises:
            DataError: if it does not have the shape that the other side expects.
        """
        if not self._info.peers:
            return
        if len(self._flying) >= self._link.in_flight:
            self._wait_for_oldest()
        with self._link.spans.span(self._info, self._number):
            shapes = self._shapes[self._number]
            if isinstance(shapes, DynamicShape):
                assert len(self.numbers) == shapes.numbers, "the other side waits for another number of them"
                self._flying.append(self._announced(tensor))
            else:
                self._flying.append(self._parts(tensor, shapes))
        self._number += 1

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
                f"{self._link.label}: what module {self._link.module!r} passes on has the shape {tuple(tensor.shape)}, "
                f"but the other side expects {whole} of this microbatch. Pass on one row of the hidden size for each "
                f"placeholder token, and between pipeline stages of the language module (sequence, batch, hidden)."
            )
        parts = tensor.detach().split([shape[0] for shape in shapes])
        return [
            self._post(part.contiguous(), peer, _DATA)
            for part, peers in zip(parts, self._link.routes.sends, strict=True)
            for peer in peers
            if part.numel()
        ]

    def _announced(self, tensor: torch.Tensor) -> list[tuple[dist.Work, torch.Tensor]]:
        assert tensor.ndim == _DIMENSIONS and self._link.routes.parts == 1
        announcement = torch.tensor([*tensor.shape, *self.numbers], device=tensor.device)
        posted = []
        for peer in self._info.peers:
            posted.append(self._post(announcement, peer, _ANNOUNCEMENT))
            if tensor.numel():
                posted.append(self._post(tensor.detach().contiguous(), peer, _DATA))
        return posted

    def _post(self, tensor: torch.Tensor, peer: int, tag: int) -> tuple[dist.Work, torch.Tensor]:
        return dist.isend(tensor, dst=peer, group=self._group, tag=tag), tensor


class ReceiveChannel:
    """Receives one microbatch after the other.

    Attributes:
        numbers: that were told with the last shape that was announced.
    """

    def __init__(self, link: P2PLink, direction: str) -> None:
        self._link = link
        self._info = link.span_info("receive", direction, link.routes.receives)
        self._group = link.group(direction)
        # NCCL's receives occupy the device until the data come.
        self._ahead = 1 if dist.get_backend(self._group) == "gloo" else 0
        self._posted: deque[tuple[list[torch.Tensor], list[dist.Work]]] = deque()
        self._shapes: Sequence[Shapes | DynamicShape] = ()
        self._number = 0
        self.numbers: tuple[int, ...] = ()

    def expect(self, shapes: Sequence[Shapes | DynamicShape]) -> None:
        """Begin a pass, in which every one of these microbatches is received; arguments as for :class:`SendChannel`."""
        assert not self._posted, "the pass before was not finished"
        self._shapes, self._number = shapes, 0
        self._post_up_to(self._ahead)

    def receive(self) -> torch.Tensor:
        """The next microbatch, its parts one after the other in the first dimension."""
        with self._link.spans.span(self._info, self._number):
            self._post_up_to(self._number + 1 + self._ahead)
            parts, works = self._posted.popleft()
            self._link.on_first_wait.do()
            for work in works:
                work.wait()
            if isinstance(self._shapes[self._number], DynamicShape):
                parts = [self._receive_announced(*parts)]
        self._number += 1
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _post_up_to(self, end: int) -> None:
        for shapes in self._shapes[self._number + len(self._posted) : end]:
            self._posted.append(self._post(shapes))

    def _post(self, shapes: Shapes | DynamicShape) -> tuple[list[torch.Tensor], list[dist.Work]]:
        device = torch.cuda.current_device()
        if isinstance(shapes, DynamicShape):
            parts, tag = [torch.empty(_DIMENSIONS + shapes.numbers, dtype=torch.int64, device=device)], _ANNOUNCEMENT
        else:
            parts, tag = [torch.empty(shape, dtype=self._link.dtype, device=device) for shape in shapes], _DATA
        return parts, [
            dist.irecv(part, src=peer, group=self._group, tag=tag)
            for part, peer in zip(parts, self._link.routes.receives, strict=True)
            if part.numel()
        ]

    def _receive_announced(self, announcement: torch.Tensor) -> torch.Tensor:
        told = announcement.tolist()
        shape, self.numbers = told[:_DIMENSIONS], tuple(told[_DIMENSIONS:])
        part = torch.empty(shape, dtype=self._link.dtype, device=announcement.device)
        if part.numel():
            dist.irecv(part, src=self._info.peers[0], group=self._group, tag=_DATA).wait()
        return part


def _backward_shapes(shapes: Sequence[Shapes | DynamicShape]) -> list[Shapes | DynamicShape]:
    """Gradients have the shapes of activations; no numbers go with them."""
    return [DynamicShape() if isinstance(each, DynamicShape) else each for each in shapes]


class Sender:
    """Where activations leave a module or a pipeline stage, and gradients come back if anybody needs them.

    Has the methods of megatron-core's BridgeCommunicator that its MultiModulePipelineCommunicator calls on this side.
    """

    def __init__(self, link: P2PLink, *, source: str, gradients: bool) -> None:
        """
        Args:
            link: to where.
            source: the module, under whose name megatron-core keeps the tensors.
            gradients: whether they come back; the other side must know as well.
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

    def tell(self, numbers: tuple[int, ...]) -> None:
        """Numbers that go with the next activations, where their shape is announced."""
        self._forward.numbers = numbers

    def send_forward(self, activations: torch.Tensor) -> None:
        self._forward.send(activations)

    def recv_backward(self) -> torch.Tensor | None:
        return None if self._backward is None else self._backward.receive()

    def send_forward_recv_backward(self, activations: torch.Tensor) -> torch.Tensor | None:
        self.send_forward(activations)
        return self.recv_backward()


class Receiver:
    """Where activations enter a module or a pipeline stage; the other side of an :class:`Sender`."""

    def __init__(self, link: P2PLink, *, source: str, gradients: bool) -> None:
        """Arguments as for :class:`Sender`; ``source`` is where activations come from."""
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
        """Numbers that came with the last activations, where their shape was announced."""
        return self._forward.numbers

    def recv_forward(self) -> torch.Tensor:
        # The graph of this rank begins here.
        return self._forward.receive().requires_grad_()

    def send_backward(self, gradients: torch.Tensor) -> None:
        if self._backward is not None:
            self._backward.send(gradients)

    def send_backward_recv_forward(self, gradients: torch.Tensor) -> torch.Tensor:
        self.send_backward(gradients)
        return self.recv_forward()

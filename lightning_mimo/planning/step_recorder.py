"""Watches every torch operation of a rank on fake tensors: memory, arithmetic, recomputation and messages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_mimo.observe.spans import BACKWARD, FORWARD, Spans
from lightning_mimo.planning.costs import Message, OperationKind, Operations, Work
from lightning_mimo.planning.memory_ledger import ACTIVATIONS, MemoryLedger
from lightning_mimo.planning.operation_cache import Effort, OperationCache, effort_of, tensors_in
from lightning_mimo.upstream.torch import FakeTensor, FakeTensorMode, TorchDispatchMode, unset_fake_temporarily

Segment = Literal["before", "layers", "after"]
"""Part of a module's pass: before, in or after its transformer layers."""

STEP = "step"
"""Pass of what happens once per step: reductions, norms, the update."""

_Place = tuple[str, str, Segment]
"""Module, pass and segment that an operation counts for."""

_aten = torch.ops.aten
_c10d = torch.ops.c10d
_DEVICE = torch.ops.prim.device.default  # what `tensor.device` runs, more often than any operation
# Integers up to this number of elements keep their values, so that code may read them: sizes of images, numbers of
# tokens of experts, token ids.
_MOST_REAL = 2**22
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_OPERATIONS = {
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
}
_COALESCED = {
    "allgather_into_tensor_coalesced_": _c10d._allgather_base_.default,
    "reduce_scatter_tensor_coalesced_": _c10d._reduce_scatter_base_.default,
}


@dataclass(frozen=True)
class Phase:
    """A part of a step.

    Attributes:
        kind: kind of the rank's current span, such as ``forward`` or ``optimizer``; empty outside of all.
        module: module that is computed; empty if there is none.
        microbatch: its index; ``None`` if there is none.
        segment: part of the module's pass.
    """

    kind: str
    module: str
    microbatch: int | None
    segment: str

    def __str__(self) -> str:
        if not self.kind:
            return "between passes"
        text = f"{self.kind} of {self.module}" if self.module else self.kind
        return text if self.microbatch is None else f"{text}, microbatch {self.microbatch}"


@dataclass(kw_only=True)
class Exchange:
    """What ranks that are run one after the other tell each other.

    Attributes:
        flags: what ranks have said in each collective of yes-or-no flags of a set-up, in order; any yes counts.
        collecting: whether ranks only say their flags; the answer is then always yes.
        sent: (source, destination) -> small integer tensors that were sent, in order.
        operations: what operations on fake tensors gave on any rank.
    """

    flags: list[list[bool]] = field(default_factory=list)
    collecting: bool = False
    sent: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)
    operations: OperationCache = field(default_factory=OperationCache)


class StepRecorder(TorchDispatchMode):
    """Counts what one rank does. Enter it inside of a ``FakeTensorMode`` that allows other tensors.

    Whole numbers stay real, and what is computed from them alone is computed; everything else is fake. Where code reads
    a number from a fake tensor, it is 0.

    Attributes:
        ledger: memory.
        spans: the rank's spans, which say what it is doing.
        segment: part of the module's pass, set by hooks on its layers.
        counting: whether operations and messages are counted.
        kept: bytes of activations at the end of each segment of the last forward pass, and of the loss.
        layer_output: bytes of what the layers gave in the last forward pass.
    """

    def __init__(
        self,
        mode: FakeTensorMode,
        spans: Spans,
        exchange: Exchange,
        axes: Mapping[str, tuple[str, tuple[int, ...]]],
    ) -> None:
        """
        Args:
            mode: the mode inside of which this one is entered.
            spans: the rank's spans.
            exchange: shared by all ranks of a layout.
            axes: name of a process group -> name of the axis, and its ranks.
        """
        super().__init__()
        self.ledger = MemoryLedger()
        self.spans = spans
        self.segment: Segment = "before"
        self.counting = False
        self.kept: dict[Segment, int] = {}
        self.layer_output = 0
        self._exchange = exchange
        self._axes = axes
        self._asked = 0
        self._received: Counter[tuple[int, int]] = Counter()
        self._depth = 0  # of modules that are running forward
        self._operations: dict[_Place, dict[OperationKind, list[int]]] = {}
        self._messages: dict[_Place, dict[tuple[str, str, tuple[int, ...]], list[int]]] = {}
        self._hooks: list[Any] = []
        self._mode = mode
        self._handles: dict[Any, tuple[bool, Any]] = {}  # operation -> whether it returns tensors as well, the handle
        self._phase: tuple[tuple[int, Segment], Phase] | None = None

    def __enter__(self) -> Self:
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, traceback)
        for hook in self._hooks:
            hook.remove()

    def work(self, module: str, pass_: str, segment: Segment | None = None) -> Work:
        """What was counted for a module in ``forward``, ``backward`` or ``recompute``, or for :data:`STEP`.

        Args:
            module: the module; empty for :data:`STEP`.
            pass_: the pass.
            segment: only what was done in this part of the pass.
        """
        total = Work()
        for place in dict.fromkeys((*self._operations, *self._messages)):
            if place[:2] == (module, pass_) and segment in (None, place[2]):
                total += self._work_at(place)
        return total

    def _work_at(self, place: _Place) -> Work:
        operations, messages = self._operations.get(place, {}), self._messages.get(place, {})
        return Work(
            operations={kind: Operations(flops=f, bytes=b, count=n) for kind, (f, b, n) in operations.items()},
            messages=tuple(
                Message(over=over, operation=operation, ranks=ranks, bytes=size, count=count)
                for (over, operation, ranks), (size, count) in messages.items()
            ),
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = kwargs or {}
        tensors = list(tensors_in((*args, *kwargs.values())))
        is_fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs, is_fake=is_fake)
        if not is_fake and (tensors or _makes_whole_numbers(func, args, kwargs)):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            effort = effort_of(func, args, kwargs, tensors, out)
        elif func._overloadpacket is _aten._local_scalar_dense:
            return False if args[0].dtype == torch.bool else 0.0 if args[0].dtype.is_floating_point else 0
        else:
            func, args, tensors = _with_known_shape(func, args, tensors)
            out, effort = self._exchange.operations.run(func, args, kwargs, tensors, self._mode)
        self._count(effort, out)
        return out

    def _count(self, effort: Effort, out: Any) -> None:
        phase = self.phase()
        for tensor in tensors_in((out,)):
            self.ledger.add(tensor, phase)
        if not self.counting or not effort.bytes:
            return
        totals = self._operations.setdefault(self._place(), {}).setdefault(effort.kind, [0, 0, 0])
        totals[0] += effort.flops
        totals[1] += effort.bytes
        totals[2] += 1

    def end_segment(self, segment: Segment) -> None:
        """Note what a forward pass keeps at the end of one of its segments."""
        self.kept[segment] = self.ledger.live[ACTIVATIONS]

    def phase(self) -> Phase:
        """What the rank is doing."""
        now = self.spans.changes, self.segment
        if self._phase is None or self._phase[0] != now:
            self._phase = now, self._new_phase()
        return self._phase[1]

    def _new_phase(self) -> Phase:
        span = self.spans.current()
        if span is None:
            return Phase("", "", None, "")
        segment = self.segment if span.info.kind in (FORWARD, BACKWARD) else ""
        return Phase(span.info.kind, span.info.module, span.microbatch, segment)

    def _place(self) -> _Place:
        """Module, pass and segment that an operation counts for."""
        span = self.spans.current()
        if span is None or span.info.kind not in (FORWARD, BACKWARD):
            return "", STEP, self.segment
        if span.info.kind == BACKWARD and self._depth:
            return span.info.module, "recompute", self.segment
        return span.info.module, span.info.kind, self.segment

    def _enter_module(self, module: torch.nn.Module, args: Any) -> None:
        self._depth += 1

    def _leave_module(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1

    # ------------------------------------------------- communication

    def _communicate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_fake: bool) -> Any:
        name = func._overloadpacket.__name__
        if name == "allreduce_coalesced_":
            return self._communicate(
                _c10d.allreduce_.default, (args[0], args[1], args[2], None, *args[3:]), kwargs, is_fake=is_fake
            )[1]
        if name in _COALESCED:
            works = [
                self._communicate(_COALESCED[name], (one, other, *args[2:]), kwargs, is_fake=is_fake)[1]
                for one, other in zip(args[0], args[1], strict=True)
            ]
            return works[-1]
        self._note(name, args)
        if is_fake:
            return self._communicate_nothing(func, args, kwargs)
        with unset_fake_temporarily():
            out = func(*args, **kwargs)
        tensors = list(tensors_in(args))
        if name == "allreduce_" and len(tensors) == 1 and tensors[0].dtype == torch.int32:
            self._exchange_flags(tensors[0])
        elif name in ("send", "recv_"):
            self._exchange_numbers(name, tensors[0], args)
        return out

    def _communicate_nothing(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of fake tensors nothing is sent. One handle stands for all, because making them takes long."""
        if func not in self._handles:
            out = func(*args, **kwargs)
            self._handles[func] = isinstance(out, tuple), out[-1] if isinstance(out, tuple) else out
        gives_tensors, handle = self._handles[func]
        return (args[0], handle) if gives_tensors else handle

    def _exchange_flags(self, flags: torch.Tensor) -> None:
        """Flags are the one thing for which a set-up asks other ranks; any yes counts."""
        number, self._asked = self._asked, self._asked + 1
        said = self._exchange.flags
        if number == len(said):
            said.append([False] * flags.numel())
        with unset_fake_temporarily():
            said[number] = [bool(mine) or theirs for mine, theirs in zip(flags.tolist(), said[number], strict=True)]
            if self._exchange.collecting:
                flags.fill_(1)
            else:
                flags.copy_(torch.tensor(said[number], dtype=flags.dtype))

    def _exchange_numbers(self, name: str, tensor: torch.Tensor, args: tuple[Any, ...]) -> None:
        peer = dist.get_process_group_ranks(_group_of(args))[args[2]]
        me = dist.get_rank()
        with unset_fake_temporarily():
            if name == "send":
                self._exchange.sent.setdefault((me, peer), []).append(tensor.clone())
                return
            number = self._received[peer, me]
            self._received[peer, me] += 1
            told = self._exchange.sent[peer, me]
            tensor.copy_(told[number % len(told)])  # of every microbatch the same

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        if not self.counting or name not in _OPERATIONS:
            return
        group = _group_of(args)
        sizes = [sum(each.nbytes for each in tensors_in((arg,))) for arg in args[:2]]
        axis, ranks = self._axes.get(group.group_name, ("other", tuple(dist.get_process_group_ranks(group))))
        place, span = self._place(), self.spans.current()
        if len(ranks) == 1:
            return
        if span is not None and span.info.edge:
            back = span.info.label.endswith(BACKWARD)
            axis = f"{span.info.edge}, backward" if back else span.info.edge
            place = span.info.module, BACKWARD if back else FORWARD, self.segment
        elif axis.startswith(("dp ", "expt_dp ", "world")):
            place = "", STEP, self.segment  # what overlaps with the last backward pass is done once as well
        if name == "send":
            ranks = (dist.get_rank(), ranks[args[2]])
        totals = self._messages.setdefault(place, {}).setdefault((axis, _OPERATIONS[name], ranks), [0, 0])
        totals[0] += max(sizes)
        totals[1] += 1


def _group_of(args: tuple[Any, ...]) -> dist.ProcessGroup:
    return dist.ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))


def _makes_whole_numbers(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation without tensors makes a small one of whole numbers."""
    dtype = kwargs.get("dtype")
    if dtype is None:
        is_range = func._overloadpacket is _aten.arange and all(isinstance(arg, int) for arg in args)
        return is_range
    shape = args[0] if args and isinstance(args[0], list | tuple) else ()
    device = kwargs.get("device")
    on_meta = device is not None and torch.device(device).type == "meta"
    return dtype in _WHOLE and not on_meta and math.prod(shape) <= _MOST_REAL


def _with_known_shape(
    func: Any, args: tuple[Any, ...], tensors: list[torch.Tensor]
) -> tuple[Any, tuple[Any, ...], list[torch.Tensor]]:
    """An operation whose result's shape depends on real numbers, as one where it depends on shapes only."""
    packet = func._overloadpacket
    if packet is _aten.masked_select and not isinstance(args[1], FakeTensor):
        number = int(args[1].broadcast_to(args[0].shape).sum())
        return _aten.new_empty.default, (args[0], [number]), [args[0]]
    if packet in (_aten.index, _aten.index_put, _aten.index_put_):
        args = (args[0], [each for index in args[1] for each in _as_numbers(index)], *args[2:])
        return func, args, list(tensors_in(args))
    return func, args, tensors


def _as_numbers(index: Any) -> list[Any]:
    """An index of booleans as indices of numbers, whose length is known."""
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
        with unset_fake_temporarily():
            return list(index.nonzero(as_tuple=True))
    return [index]

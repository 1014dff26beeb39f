"""Watches every operation of a rank whose GPU is fake: CPU tensors are real, CUDA tensors have no elements."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lightning_mimo.observe.flops import FLOP_FORMULAS
from tests.fake_cuda.places import Place, describe, innermost, where
from tests.fake_cuda.records import Event, Kind

aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_FLOAT64_LIMIT = 4096  # elements; more than the figures of a step have
# Their result has a size that only the device knows, so the host waits for it.
_SIZED_BY_VALUES = (
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
)
_ATTENTION_OPERANDS = 3
_FEW = 4096  # elements that are remembered
_BLOCK = 512  # bytes; torch's allocator rounds up to it

Communicate = Callable[[torch._ops.OpOverload, tuple[Any, ...], dict[str, Any]], Any]


@functools.cache
def _fake_mode() -> FakeTensorMode:
    """One for the whole process: tensors of two must not meet, and some are kept from case to case."""
    return FakeTensorMode()


class Recorder(TorchDispatchMode):
    """Executes operations on fake CUDA tensors without computing, and records what a GPU would not like.

    Operations on CPU tensors are executed as always. On the device, floating-point numbers count as zero, and integers
    that are computed from them or from those of the host are known (:func:`known`) where they are few.

    Attributes:
        events: what was recorded.
        phase: name of what is going on, for events.
        reads: how often the host has waited for the device.
        is_idle: whether the device has been given nothing to do since then.
        live: place of allocation -> bytes of live tensors on the device.
        dtype: dtype in which matrix products and attention must be computed; ``None`` does not check.
        communicate: executes the operations of torch.distributed.
    """

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: the only GPU that this rank may use.
        """
        super().__init__()
        self.events: list[Event] = []
        self.phase = "setup"
        self.reads = 0
        self.is_idle = True
        self.live: Counter[Place | None] = Counter()
        self.dtype: torch.dtype | None = None
        self.communicate: Communicate
        self._device = device
        self._fake = _fake_mode()
        self._storages: set[int] = set()

    def note(self, kind: Kind, what: str) -> None:
        self.events.append(Event(kind=kind, phase=self.phase, what=what, where=where()))

    def read(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        """Record that the host waits for a tensor of the device, and return its elements: known ones, or zeros."""
        self.note("host read", f"{how} of {_described(tensor)}")
        self.reads += 1
        self.is_idle = True
        return known(tensor)

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE:  # more than half of all calls: every ``tensor.device``
            return args[0].fake_device
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self.communicate(func, args, kwargs)
        tensors = list(tensors_of((args, kwargs)))
        fakes = [each for each in tensors if isinstance(each, FakeTensor)]
        device = kwargs.get("device")
        to_device = device is not None and torch.device(device).type == "cuda"
        if not fakes and not to_device:
            return func(*args, **kwargs)
        self.is_idle = False
        if (result := self._moved(func, args, kwargs, tensors, to_device=to_device)) is not NotImplemented:
            return result
        self._check(func, args, tensors, fakes)
        if func._schema.is_mutable:
            for each in tensors:
                vars(each).pop("known_values", None)
        originals = args, kwargs
        if len(fakes) < len(tensors):
            args, kwargs = tree_map_only(torch.Tensor, self._as_fake, (args, kwargs))
        result = self._fake.dispatch(func, types, args, kwargs)
        return self._noted(result, self._values(func, *originals, tensors, result))

    @staticmethod
    def _values(
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
        result: Any,
    ) -> Any:
        """The elements of integers in a result, as if all floating-point numbers were zero; None if there are none."""
        if not tensors or func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
            return None
        if func._overloadpacket in FLOP_FORMULAS or any(each.numel() > _FEW for each in tensors):
            return None
        if all(each.is_floating_point() for each in tensors_of(result)):
            return None
        if not all(each.is_floating_point() or is_known(each) for each in tensors):
            return None
        args, kwargs = tree_map_only(torch.Tensor, known, (args, kwargs))
        return func(*args, **({**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs))

    def _moved(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
        *,
        to_device: bool,
    ) -> Any:
        """Result of an operation that moves elements between host and device; NotImplemented for all others."""
        packet = func._overloadpacket
        if packet is aten._local_scalar_dense:
            return self.read(args[0], "item()").item()
        if packet is aten.equal or packet is aten.is_nonzero:
            return bool(self.read(args[0], packet.__name__).any())
        if packet is aten._to_copy:
            (source,) = tensors
            if to_device and not isinstance(source, FakeTensor):
                self._copied_to_device(source, non_blocking=kwargs.get("non_blocking", False))
                return self._noted(self._on_device(source, kwargs.get("dtype")), values=source)
            if isinstance(source, FakeTensor) and kwargs.get("device") == torch.device("cpu"):
                # An asynchronous copy goes to pinned memory, which torch allocates for it.
                values = known(source) if kwargs.get("non_blocking") else self.read(source, "copy to the host")
                return values.to(kwargs.get("dtype") or source.dtype)
        if packet is aten.copy_ and len(tensors) == 2:
            target, source = tensors
            if isinstance(target, FakeTensor) and not isinstance(source, FakeTensor):
                self._copied_to_device(source, non_blocking=args[2] if len(args) > 2 else False)
                return target
            if isinstance(source, FakeTensor) and not isinstance(target, FakeTensor):
                is_asynchronous = (args[2] if len(args) > 2 else False) and target.is_pinned()
                values = known(source) if is_asynchronous else self.read(source, "copy to the host")
                return target.copy_(values)
        if packet is aten.record_stream:
            return None
        if packet in _SIZED_BY_VALUES:
            values = self.read(args[0], packet.__name__)
            if packet is aten.nonzero:
                found = values.nonzero()
                return self._noted(self._on_device(found), found)
            return self._noted(self._on_device(torch.empty(0), args[0].dtype))
        return NotImplemented

    def _check(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], tensors: list[torch.Tensor], fakes: list[FakeTensor]
    ) -> None:
        """Record operands on a wrong device or of a wrong dtype."""
        packet = func._overloadpacket
        if packet is aten.index and any(each is not None and each.dtype == torch.bool for each in args[1]):
            self.note("host read", f"index by a mask of {_described(args[0])}")
        for each in tensors:
            if not isinstance(each, FakeTensor) and each.ndim > 0 and len(fakes) and each.device.type == "cpu":
                self.note("device", f"{packet.__name__} of a CUDA tensor and of a CPU tensor {_described(each)}")
        if self.dtype is not None and packet in FLOP_FORMULAS:
            # Of attention, only the first are operands; its sums are float32 always.
            operands = fakes[:_ATTENTION_OPERANDS] if "attention" in packet.__name__ else fakes
            wrong = {each.dtype for each in operands if each.is_floating_point()} - {self.dtype}
            if wrong:
                self.note("dtype", f"{packet.__name__} in {', '.join(map(str, wrong))} in place of {self.dtype}")

    def _noted(self, result: Any, values: Any = None) -> Any:
        """Give results on the CPU elements, record those on a wrong device, and count the memory of the others."""
        if not isinstance(result, torch.Tensor):
            if isinstance(values, list | tuple):
                return type(result)(self._noted(each, value) for each, value in zip(result, values, strict=True))
            return tree_map_only(FakeTensor, self._noted, result)
        if not isinstance(result, FakeTensor):
            return result
        if result.device.type != "cuda":
            return torch.zeros(result.shape, dtype=result.dtype)
        if result.device != self._device:
            self.note("device", f"a tensor {_described(result)} on {result.device} in place of {self._device}")
        is_large = self.dtype not in (None, torch.float64) and result.numel() > _FLOAT64_LIMIT
        if is_large and result.dtype == torch.float64:
            self.note("dtype", f"a result {_described(result)}")
        if isinstance(values, torch.Tensor) and not values.is_floating_point():
            set_known(result, values)
        self._count(result)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            size = -(-storage.nbytes() // _BLOCK) * _BLOCK
            place = innermost()
            self._storages.add(key)
            self.live[place] += size
            weakref.finalize(storage, self._free, key, place, size)

    def _free(self, key: int, place: Place | None, size: int) -> None:
        self._storages.discard(key)
        self.live[place] -= size

    def live_by_place(self) -> dict[str, int]:
        """Place of allocation -> bytes of live tensors."""
        found: Counter[str] = Counter()
        for place, size in self.live.items():
            if size:
                found[describe(place)] += size
        return dict(found)

    def _copied_to_device(self, source: torch.Tensor, *, non_blocking: bool) -> None:
        faults = ["blocking"] * (not non_blocking) + ["from pageable memory"] * (not source.is_pinned())
        if faults and source.numel():
            self.note("copy to the device", f"{_described(source)}, {' and '.join(faults)}")

    def _on_device(self, like: torch.Tensor, dtype: torch.dtype | None = None) -> FakeTensor:
        with self._fake:
            return torch.empty_strided(like.shape, like.stride(), dtype=dtype or like.dtype, device=self._device)

    def _as_fake(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor)


def is_known(tensor: torch.Tensor) -> bool:
    """Whether the elements of a tensor are known: it is on the CPU, or computed from integers of the host."""
    return not isinstance(tensor, FakeTensor) or "known_values" in vars(tensor)


def known(tensor: torch.Tensor) -> torch.Tensor:
    """Elements of a tensor of the fake device, as a new tensor on the CPU: those that are known, or zeros."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    values = vars(tensor).get("known_values")
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if values is None else values.clone()


def set_known(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Remember the elements of a tensor on the fake device, until it is written to."""
    if values.numel() <= _FEW:
        vars(tensor)["known_values"] = values.detach().clone()


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)

"""Remembers what operations on fake tensors give, because the same ones come with every layer and microbatch."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch

from lightning_mimo.observe.flops import FLOP_FORMULAS
from lightning_mimo.planning.costs import OperationKind
from lightning_mimo.upstream.torch import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_DEPEND_ON_VALUES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view)


class Effort(NamedTuple):
    """Arithmetic and traffic of one operation.

    Attributes:
        kind: kind of the operation.
        flops: floating-point operations.
        bytes: bytes read and written; 0 for a view.
    """

    kind: OperationKind
    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class _New:
    """A tensor that an operation makes, with a storage of its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class _Given:
    """A tensor that an operation returns after it has written into it: its position among the arguments' tensors."""

    position: int


type _Output = _New | _Given | list[_Output] | tuple[_Output, ...] | None
"""One of them, none, or several in a list or tuple of any depth."""


class _Known(NamedTuple):
    outputs: _Output
    effort: Effort


@dataclass(kw_only=True)
class OperationCache:
    """What operations have given, by shapes and options of their arguments.

    An operation is run by torch's fake tensors once, and afterwards its outputs are made from what is remembered. This
    takes a fraction of the time.
    """

    _known: dict[Hashable, _Known | None] = field(default_factory=dict)

    def run(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tensors: Sequence[torch.Tensor],
        mode: FakeTensorMode,
    ) -> tuple[Any, Effort]:
        """Run an operation and return what it gives.

        Args:
            func: the operation.
            args: its arguments, of which at least one is fake, or none is a tensor.
            kwargs: its keyword arguments.
            tensors: all tensors among them, in order.
            mode: the mode that is active, of the fake tensors.
        """
        if tensors and _is_view(func):
            return _view(func, args, kwargs, tensors, mode), Effort("elementwise", 0, 0)
        key = _key_of(func, args, kwargs)
        known = self._known.get(key) if key is not None else None
        if known is not None:
            return _again(known.outputs, tensors, mode), known.effort
        before = {tensor.untyped_storage()._cdata for tensor in tensors}
        out = func(*args, **kwargs)
        effort = effort_of(func, args, kwargs, tensors, out)
        if key is not None and key not in self._known:
            outputs = _remembered(out, tensors, before)
            self._known[key] = None if outputs is _CANNOT else _Known(outputs, effort)
        return out, effort


def effort_of(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Sequence[torch.Tensor], out: Any
) -> Effort:
    """Arithmetic and traffic of an operation that gave ``out``."""
    if _is_view(func):
        return Effort("elementwise", 0, 0)
    packet = func._overloadpacket
    flops = 0
    kind: OperationKind = "elementwise"
    if packet in FLOP_FORMULAS:
        flops = int(FLOP_FORMULAS[packet](*args, **kwargs, out_val=out))
        kind = "attention" if "attention" in packet.__name__ else "matmul"
        if _is_causal(func, args, kwargs):
            flops //= 2
    size = sum(min(each.nbytes, each.untyped_storage().nbytes()) for each in (*tensors, *tensors_in((out,))))
    return Effort(kind, flops, size)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists and tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


_CANNOT = object()


def _view(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensors: Sequence[torch.Tensor],
    mode: FakeTensorMode,
) -> Any:
    """Make a view, which is cheap without what torch's fake tensors do around it."""
    device = _device_of(tensors[0])
    with in_kernel_invocation_manager(mode):
        out = func(*args, **kwargs)
    if isinstance(out, torch.Tensor):
        return FakeTensor(mode, out, device)
    return type(out)(FakeTensor(mode, each, device) for each in out)


def _again(output: _Output, tensors: Sequence[torch.Tensor], mode: FakeTensorMode) -> Any:
    match output:
        case _Given():
            return tensors[output.position]
        case _New():
            with in_kernel_invocation_manager(mode):
                new = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta")
            return FakeTensor(mode, new, output.device)
        case list():
            return [_again(each, tensors, mode) for each in output]
        case tuple():
            return tuple(_again(each, tensors, mode) for each in output)
    return None


def _remembered(out: Any, tensors: Sequence[torch.Tensor], before: set[int]) -> Any:
    """What an operation gave, in a form from which it can be made again; ``_CANNOT`` if it can not."""
    if out is None:
        return None
    if isinstance(out, list | tuple):
        each = [_remembered(one, tensors, before) for one in out]
        return _CANNOT if _CANNOT in each else type(out)(each)
    if not isinstance(out, torch.Tensor):
        return _CANNOT
    for position, tensor in enumerate(tensors):
        if out is tensor:
            return _Given(position)
    storage = out.untyped_storage()
    span = 1 + sum((size - 1) * stride for size, stride in zip(out.shape, out.stride(), strict=True))
    is_alone = storage._cdata not in before and storage.nbytes() == (span if out.numel() else 0) * out.itemsize
    if not isinstance(out, FakeTensor) or not is_alone or out.storage_offset():
        return _CANNOT
    before.add(storage._cdata)
    return _New(tuple(out.shape), out.stride(), out.dtype, out.fake_device)


def _key_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable | None:
    """What decides the outputs of an operation; ``None`` if that is more than shapes and options."""
    if _depends_on_values(func):
        return None
    parts: list[Any] = [func, torch.get_default_dtype()]
    for value in args:
        _add_part(parts, value)
    for name, value in kwargs.items():
        parts.append(name)
        _add_part(parts, value)
    key = tuple(parts)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _add_part(parts: list[Any], value: Any) -> None:
    if isinstance(value, torch.Tensor):
        parts += (value.shape, value.stride(), value.dtype, value.untyped_storage().nbytes(), _device_of(value))
    elif isinstance(value, list | tuple):
        parts += (type(value), len(value))
        for each in value:
            _add_part(parts, each)
    else:
        parts += (type(value), value)  # 1 and 1.0 are equal, and give different dtypes


def _device_of(tensor: torch.Tensor) -> torch.device:
    # The device of a fake tensor is an operation of its own.
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


@cache
def _depends_on_values(func: Any) -> bool:
    return any(tag in func.tags for tag in _DEPEND_ON_VALUES)


@cache
def _is_view(func: Any) -> bool:
    """Whether an operation moves no data."""
    if func is torch.ops.aten._unsafe_view.default:  # a view that autograd does not treat as one
        return True
    returns = func._schema.returns
    return bool(returns) and all(each.alias_info is not None and not each.alias_info.is_write for each in returns)


def _is_causal(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    names = [argument.name for argument in func._schema.arguments]
    if "is_causal" not in names:
        return False
    place = names.index("is_causal")
    return bool(args[place] if place < len(args) else kwargs.get("is_causal", False))

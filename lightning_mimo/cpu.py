"""megatron-core on a machine without CUDA: the only place in this package that patches upstream.

megatron-core writes ``device="cuda"`` and ``backend="nccl"`` in many places and reads and writes the CUDA random
generator. :func:`megatron_on_cpu` makes those mean the CPU and gloo while it is open, and puts everything back when
it closes. What is replaced, and why, is one table (:data:`REPLACEMENTS`); tensors are redirected by a
``TorchFunctionMode``, so no list of call sites has to be kept.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float64: "torch.cuda.DoubleTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


class _CpuStream:
    """Stands for a CUDA stream or event: on a CPU everything is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> _CpuStream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def _nothing(self, *args: object, **kwargs: object) -> None:
        pass

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, *args: object) -> _CpuStream:
        return self

    def query(self) -> bool:
        return True


def _nothing(*args: object, **kwargs: object) -> None:
    pass


def _stream(*args: object, **kwargs: object) -> _CpuStream:
    return _CpuStream()


def _get_rng_state(*args: object, **kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
    torch.set_rng_state(new_state)


def _with_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with ``backend="nccl"`` read as gloo, or as fake where all groups are."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "fake" if torch.distributed.get_backend() == "fake" else "gloo"
        return function(*args, **kwargs)

    return call


def _always_as_numpy(function: Callable[..., Any]) -> Callable[..., Any]:
    """``maybe_move_tensor_to_cpu`` that hands out numpy for tensors which are on the CPU already, too."""

    @functools.wraps(function)
    def call(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = function(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    return call


def _all_gather_of_any_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
    """``all_gather`` of tensors that differ in their first dimension: padded to the longest on the wire."""

    @functools.wraps(function)
    def call(tensor_list: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if all(each.shape == tensor.shape for each in tensor_list):
            return function(tensor_list, tensor, *args, **kwargs)
        longest = max(each.size(0) for each in tensor_list)
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: tensor.size(0)] = tensor
        received = [torch.empty_like(padded) for _ in tensor_list]
        function(received, padded, *args, **kwargs)
        for whole, part in zip(received, tensor_list, strict=True):
            part.copy_(whole[: part.size(0)])
        return None

    return call


def _reduce_scatter_of_any_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
    """``reduce_scatter`` of parts that differ in their first dimension: all are reduced, and one's own is kept."""

    @functools.wraps(function)
    def call(output: torch.Tensor, input_list: list[torch.Tensor], *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if all(each.shape == output.shape for each in input_list):
            return function(output, input_list, *args, group=group, **kwargs)
        whole = torch.cat(input_list)
        torch.distributed.all_reduce(whole, group=group)
        output.copy_(whole.split([len(each) for each in input_list])[torch.distributed.get_rank(group)])
        return None

    return call


def _with_mode(function: Callable[[], contextlib.AbstractContextManager[None]]) -> Callable[..., Any]:
    """``function``, a context manager, in which :class:`CudaMeansCpu` is on."""

    @contextlib.contextmanager
    def call() -> Iterator[None]:
        with CudaMeansCpu(), function():
            yield

    return call


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """One attribute to replace while the adapter is open.

    Attributes:
        module: module that holds the attribute.
        name: attribute, dotted where it sits on a class.
        make: takes the original, returns what replaces it.
        reason: why megatron-core needs it on a CPU.
    """

    module: str
    name: str
    make: Callable[[Any], Any]
    reason: str


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


_RANDOM = "megatron.core.tensor_parallel.random"
_GENERATOR = "the RNG tracker saves and restores the CUDA generator; on a CPU that is the default generator"
_STREAMS = "streams order work on a GPU; on a CPU work is in order"

REPLACEMENTS = (
    Replacement(
        module="torch.cuda",
        name="current_device",
        make=_always(lambda: _CPU),
        reason="buffers and received activations are allocated on the current CUDA device",
    ),
    Replacement(module="torch.cuda", name="synchronize", make=_always(_nothing), reason=_STREAMS),
    Replacement(module="torch.cuda", name="current_stream", make=_always(_stream), reason=_STREAMS),
    Replacement(module="torch.cuda", name="stream", make=_always(_stream), reason=_STREAMS),
    Replacement(module="torch.cuda", name="Stream", make=_always(_CpuStream), reason=_STREAMS),
    Replacement(module="torch.cuda", name="Event", make=_always(_CpuStream), reason=_STREAMS),
    Replacement(
        module="torch.cuda", name="empty_cache", make=_always(_nothing), reason="there is no CUDA allocator cache"
    ),
    Replacement(module="torch.cuda.nvtx", name="range_push", make=_always(_nothing), reason="no profiler ranges"),
    Replacement(module="torch.cuda.nvtx", name="range_pop", make=_always(_nothing), reason="no profiler ranges"),
    Replacement(module="torch.cuda", name="get_rng_state", make=_always(_get_rng_state), reason=_GENERATOR),
    Replacement(module="torch.cuda", name="set_rng_state", make=_always(_set_rng_state), reason=_GENERATOR),
    Replacement(
        module="torch.cuda", name="manual_seed", make=_always(lambda seed: torch.manual_seed(seed)), reason=_GENERATOR
    ),
    Replacement(module=_RANDOM, name="_get_cuda_rng_state", make=_always(_get_rng_state), reason=_GENERATOR),
    Replacement(module=_RANDOM, name="_set_cuda_rng_state", make=_always(_set_rng_state), reason=_GENERATOR),
    Replacement(
        module=_RANDOM,
        name="_fork_rng",
        make=_with_mode,
        reason="recomputed activations are computed inside of backward, where torch has switched CudaMeansCpu off",
    ),
    Replacement(
        module="megatron.core.transformer.moe.token_dispatcher",
        name="maybe_move_tensor_to_cpu",
        make=_always_as_numpy,
        reason="all-to-all takes its split sizes as numpy; only tensors on a GPU would be converted",
    ),
    Replacement(
        module="torch.distributed",
        name="all_gather",
        make=_all_gather_of_any_sizes,
        reason="ranks that share experts gather different numbers of tokens, which NCCL allows and gloo does not",
    ),
    Replacement(
        module="torch.distributed",
        name="reduce_scatter",
        make=_reduce_scatter_of_any_sizes,
        reason="the way back: ranks that share experts get different numbers of tokens",
    ),
    Replacement(
        module="torch.distributed",
        name="new_subgroups_by_enumeration",
        make=_with_gloo,
        reason="ColocatedBridgeCommunicator asks for backend='nccl' by name",
    ),
)


class CudaMeansCpu(TorchFunctionMode):
    """Turns every ``device="cuda"`` and ``.cuda()`` into the CPU and gives tensors their CUDA type names.

    megatron-core's optimizers sort parameters by ``tensor.type() == "torch.cuda.FloatTensor"``.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Run megatron-core on the CPU with gloo while this is open. May be nested; the outermost one restores."""
    with contextlib.ExitStack() as stack:
        for replacement in REPLACEMENTS:
            stack.enter_context(_replaced(replacement))
        stack.enter_context(_without_rng_warning())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".*environment variable CUDA_DEVICE_MAX_CONNECTIONS")
        stack.enter_context(CudaMeansCpu())
        yield


@contextlib.contextmanager
def _replaced(replacement: Replacement) -> Iterator[None]:
    owner = importlib.import_module(replacement.module)
    original = getattr(owner, replacement.name)
    setattr(owner, replacement.name, replacement.make(original))
    try:
        yield
    finally:
        setattr(owner, replacement.name, original)


@contextlib.contextmanager
def _without_rng_warning() -> Iterator[None]:
    """Mute 'CPU RNG state changed within GPU RNG context': here the two are the same generator."""

    def is_other(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()

    logger = logging.getLogger(_RANDOM)
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)

"""Runs megatron-core without CUDA. This is the only module of this package that patches dependencies.

megatron-core uses ``device="cuda"`` and ``backend="nccl"`` in many places, and reads and writes the state of the CUDA
random generator. Inside :func:`megatron_on_cpu` these mean the CPU and gloo; on exit everything is restored. All
replacements and their reasons are in one table (:data:`REPLACEMENTS`). It contains every torch function that takes a
device, so no list of call sites is needed. A ``TorchFunctionMode`` would be shorter, but it would slow down every torch
call, and it is not active in autograd's backward pass and in other threads.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
# torch's own list of functions that take a device, restricted to those that are called as torch.NAME. torch caches the
# list, so it must be requested before any of them is replaced.
_FACTORIES = sorted(each.__name__ for each in _device_constructors() if vars(torch).get(each.__name__) == each)
_FACTORIES += [
    "empty_like",
    "full_like",
    "normal",
    "ones_like",
    "rand_like",
    "randint_like",
    "randn_like",
    "zeros_like",
]
_NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float64: "torch.cuda.DoubleTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


class _CpuStream:
    """Replaces a CUDA stream or event by one that does nothing, because work on a CPU is already in order."""

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


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _factory_on_cpu(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return function(*args, **kwargs)

    return call


def _to_cpu(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(function)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return function(self, *args, **kwargs)

    return to


def _self(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return tensor


def _type_as_on_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = None if args or kwargs else _CUDA_TYPE_NAMES.get(self.dtype)
        return name or function(self, *args, **kwargs)

    return type


def _with_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function`` so that ``backend="nccl"`` means gloo, or fake if the default group is fake."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "fake" if torch.distributed.get_backend() == "fake" else "gloo"
        return function(*args, **kwargs)

    return call


def _always_as_numpy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``maybe_move_tensor_to_cpu`` so that it also converts tensors that are already on the CPU to numpy."""

    @functools.wraps(function)
    def call(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = function(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    return call


def _all_gather_of_any_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``all_gather`` so that tensors may differ in their first dimension. They are padded to the longest one."""

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
    """Wrap ``reduce_scatter`` so that parts may differ in their first dimension.

    All parts are all-reduced, and each rank keeps its own.
    """

    @functools.wraps(function)
    def call(output: torch.Tensor, input_list: list[torch.Tensor], *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if all(each.shape == output.shape for each in input_list):
            return function(output, input_list, *args, group=group, **kwargs)
        whole = torch.cat(input_list)
        torch.distributed.all_reduce(whole, group=group)
        output.copy_(whole.split([len(each) for each in input_list])[torch.distributed.get_rank(group)])
        return None

    return call


def _own_object_if_fake(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``all_gather_object`` so that in a fake world every rank gives what this one gives."""

    @functools.wraps(function)
    def call(object_list: list[Any], obj: Any, group: Any = None) -> None:
        if torch.distributed.get_backend(group) != "fake":
            function(object_list, obj, group=group)
        else:
            object_list[:] = [obj] * len(object_list)

    return call


def _with_one_device(process_group: Any) -> type:
    """Subclass ``ProcessGroupGloo`` so that all groups share the gloo device of the first one."""

    class SharingProcessGroupGloo(process_group):
        _first: Any = None

        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, enable_reconfigure: bool = False):
            cls = type(self)
            if enable_reconfigure:  # older torch versions neither accept nor request it
                super().__init__(store, rank, size, timeout=timeout, enable_reconfigure=True)
            elif cls._first is None:
                super().__init__(store, rank, size, timeout=timeout)
                cls._first = self.options
            else:
                options = process_group._Options()
                options._devices, options._threads = cls._first._devices, cls._first._threads
                options._timeout = timeout
                super().__init__(store, rank, size, options)

    return SharingProcessGroupGloo


def _when_first_called(compile_: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``torch.compile`` so that a function is given to it when it is first called."""

    @functools.wraps(compile_)
    def later(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(later, **options)
        if not inspect.isfunction(model):
            return compile_(model, **options)
        compiled = functools.cache(lambda: compile_(model, **options))

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # it becomes part of the function that calls it
                return model(*args, **kwargs)
            return compiled()(*args, **kwargs)

        return call

    return later


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """An attribute that is replaced inside :func:`megatron_on_cpu`.

    Attributes:
        module: module that contains the attribute.
        name: name of the attribute, dotted if it belongs to a class.
        make: takes the original and returns its replacement.
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
    *(
        Replacement(module="torch", name=name, make=_factory_on_cpu, reason="tensors are made on device 'cuda' by name")
        for name in _FACTORIES
    ),
    *(
        Replacement(
            module="torch",
            name=f"Tensor.{name}",
            make=_factory_on_cpu,
            reason="tensors are made on device 'cuda' by name",
        )
        for name in _NEW
    ),
    Replacement(module="torch", name="Tensor.to", make=_to_cpu, reason="tensors are moved to 'cuda' by name"),
    Replacement(module="torch", name="Tensor.cuda", make=_always(_self), reason="tensors are moved to 'cuda' by name"),
    Replacement(
        module="torch",
        name="Tensor.type",
        make=_type_as_on_cuda,
        reason="optimizers sort parameters by tensor.type() == 'torch.cuda.FloatTensor'",
    ),
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
        reason="in the backward pass, ranks that share experts receive different numbers of tokens",
    ),
    Replacement(
        module="torch.distributed",
        name="all_gather_object",
        make=_own_object_if_fake,
        reason="the optimizer compares parameter groups over the world, and fake tensors cannot hold a pickled object",
    ),
    Replacement(
        module="torch.distributed",
        name="new_subgroups_by_enumeration",
        make=_with_gloo,
        reason="ColocatedBridgeCommunicator asks for backend='nccl' by name",
    ),
    Replacement(
        module="torch.distributed.distributed_c10d",
        name="ProcessGroupGloo",
        make=_with_one_device,
        reason="otherwise every group has a thread that wakes up a hundred times a second",
    ),
)


def compiling_when_called() -> contextlib.AbstractContextManager[None]:
    """Context in which megatron-core is imported faster; also where there is a GPU.

    It compiles functions when it is imported, of which a run calls few or none, and importing torch's compiler takes
    longer than all the rest of it.
    """
    return _replaced("torch", "compile", _when_first_called)


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Context in which megatron-core runs on the CPU with gloo. May be nested; the outermost one restores."""
    with contextlib.ExitStack() as stack:
        for replacement in REPLACEMENTS:
            stack.enter_context(_replaced(replacement.module, replacement.name, replacement.make))
        stack.enter_context(_without_rng_warning())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".*environment variable CUDA_DEVICE_MAX_CONNECTIONS")
        yield


def megatron_on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """What megatron-core needs on a device: :func:`megatron_on_cpu` on the CPU, and nothing on a GPU. May be nested."""
    return megatron_on_cpu() if device.type == "cpu" else contextlib.nullcontext()


@contextlib.contextmanager
def _replaced(module: str, dotted_name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    *place, name = dotted_name.split(".")
    owner = functools.reduce(getattr, place, importlib.import_module(module))
    original, is_inherited = getattr(owner, name), name not in vars(owner)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        if is_inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


@contextlib.contextmanager
def _without_rng_warning() -> Iterator[None]:
    """Suppress 'CPU RNG state changed within GPU RNG context': here both are the same generator."""

    def is_other(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()

    logger = logging.getLogger(_RANDOM)
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)

"""What operations read, write and keep on a GPU where a CPU has another kernel for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, override

import torch
from torch.nn.functional import layer_norm, rms_norm
from torch.overrides import TorchFunctionMode

DeviceType = Literal["cpu", "cuda"]


def kernels_of(device_type: DeviceType) -> AbstractContextManager[Any]:
    """Within it, fake tensors on the CPU are counted as if they were on such a device."""
    return nullcontext() if device_type == "cpu" else _GpuKernels()


class _GpuKernels(TorchFunctionMode):
    """Replaces operations that consist of many on a CPU by one with the traffic and memory of the GPU's kernel."""

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_rms_norm if func is rms_norm else func)(*args, **(kwargs or {}))


def _rms_norm(
    input: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """One kernel, which keeps its input and a number per row; so does a layer norm.

    Source: ``rms_norm_symint`` in torch's ``aten/src/ATen/native/layer_norm.cpp``.
    """
    if weight is not None and weight.dtype != input.dtype:
        return rms_norm(input, normalized_shape, weight, eps)
    return layer_norm(input, normalized_shape, weight, eps=0.0 if eps is None else eps)

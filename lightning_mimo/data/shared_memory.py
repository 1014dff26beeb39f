"""Passes a batch from a DataLoader worker to its rank as a single tensor in shared memory, and pins it for a GPU.

torch passes every tensor through a file descriptor and a connection of its own, which takes half a millisecond of the
rank's time each. A batch has about ten tensors per microbatch.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lightning_mimo.errors import DataError
from lightning_mimo.upstream.torch import tree_map

_ALIGNMENT = 64  # bytes


class SharedMemoryBatch(list):
    """A list that is pickled with all nested CPU tensors in one block of shared memory."""

    _packed: tuple[Any, ...] | None = None

    def packed(self) -> SharedMemoryBatch:
        """Move all tensors into shared memory now. A worker does so before it hands the batch over.

        torch pickles what a worker hands over in a thread, whose errors reach nobody: the rank would wait for the
        batch until its timeout.

        Raises:
            DataError: if there is not enough shared memory.
        """
        arguments = self._pack()
        result = _unpack(*arguments)
        result._packed = arguments
        return result

    def pin_memory(self) -> SharedMemoryBatch:
        """Return a copy with all nested tensors in one block of pinned memory. Called by DataLoader.

        torch pins every tensor by itself, and cannot pin one that is expanded, such as the positions of a microbatch.
        """
        return _unpack(*self._pack(_allocate_pinned))

    def to(self, device: torch.device) -> list[Any]:
        """Return a list with all tensors moved to a device, or ``self`` for the CPU. Called by Lightning."""
        if device.type == "cpu":
            return self
        return tree_map(partial(_moved, device=device), list(self))

    def __copy__(self) -> SharedMemoryBatch:
        return SharedMemoryBatch(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, self._packed or self._pack()

    def _pack(self, allocate: Callable[[int], torch.Tensor] | None = None) -> tuple[Any, ...]:
        packer = _Packer()
        packer.dump(list(self))
        return packer.skeleton.getvalue(), *packer.pack(allocate or _allocate)


class _Packer(pickle.Pickler):
    """Pickles everything except tensors, which it collects."""

    def __init__(self) -> None:
        self.skeleton = io.BytesIO()
        super().__init__(self.skeleton, protocol=pickle.HIGHEST_PROTOCOL)
        self._tensors: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        # Tensors that are not plain are pickled as torch does it.
        if type(obj) is not torch.Tensor or not _is_plain(obj):
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self._tensors)
            self._tensors.append(obj)
        return self._numbers[id(obj)]

    def pack(
        self, allocate: Callable[[int], torch.Tensor]
    ) -> tuple[torch.Tensor, list[tuple[int, torch.dtype, tuple[int, ...]]]]:
        """Concatenate all tensors in one block of memory; also return the byte offset, dtype and shape of each.

        Args:
            allocate: number of bytes -> uint8 tensor.
        """
        places, end = [], 0
        for tensor in self._tensors:
            places.append((end, tensor.dtype, tuple(tensor.shape)))
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        together = allocate(end)
        for tensor, place in zip(self._tensors, places, strict=True):
            _view(together, *place).copy_(tensor)
        return together, places


class _Unpacker(pickle.Unpickler):
    def __init__(self, skeleton: bytes, tensors: list[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(skeleton))
        self._tensors = tensors

    def persistent_load(self, pid: int) -> torch.Tensor:
        return self._tensors[pid]


def _allocate(size: int) -> torch.Tensor:
    """Bytes in shared memory."""
    try:
        return torch.empty(size, dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"A DataLoader worker got no shared memory for a batch of {size / 2**20:.1f} MiB: {reason}. Make /dev/shm "
            f"larger (docker run --shm-size, or an emptyDir with medium: Memory on Kubernetes), or use fewer workers "
            f"or a smaller prefetch_factor; num_workers=0 needs none."
        ) from error


def _allocate_pinned(size: int) -> torch.Tensor:
    """Bytes in pinned memory."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _unpack(
    skeleton: bytes, together: torch.Tensor, places: list[tuple[int, torch.dtype, tuple[int, ...]]]
) -> SharedMemoryBatch:
    return SharedMemoryBatch(_Unpacker(skeleton, [_view(together, *place) for place in places]).load())


def _moved(leaf: Any, *, device: torch.device) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.to(device, non_blocking=True)
    return leaf.to(device) if hasattr(leaf, "to") else leaf


def _view(together: torch.Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return together[start : start + size].view(dtype).view(shape)


def _is_plain(tensor: torch.Tensor) -> bool:
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return is_dense and not tensor.requires_grad and not tensor.is_conj() and not tensor.is_neg()

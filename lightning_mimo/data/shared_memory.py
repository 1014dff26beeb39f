"""How a batch goes from a worker of a DataLoader to its rank: as one tensor, however many microbatches it has.

torch hands every tensor over by a file descriptor and a connection of its own, half a millisecond of the rank's time
each, and a batch has some ten of them for every microbatch.
"""

from __future__ import annotations

import io
import pickle
from functools import partial
from typing import Any

import torch

from lightning_mimo.upstream.torch import tree_map

_ALIGNMENT = 64  # bytes


class SharedMemoryBatch(list):
    """A list that may hold tensors, on the CPU, anywhere inside."""

    def to(self, device: torch.device) -> list[Any]:
        """Itself for the CPU, which need not be walked through; else a list of the same, moved. Lightning calls it."""
        if device.type == "cpu":
            return self
        return tree_map(partial(_moved, device=device), list(self))

    def __copy__(self) -> SharedMemoryBatch:
        return SharedMemoryBatch(self)

    def __reduce__(self) -> tuple[Any, ...]:
        packer = _Packer()
        packer.dump(list(self))
        return _unpack, (packer.skeleton.getvalue(), *packer.pack())


class _Packer(pickle.Pickler):
    """Pickles everything but tensors, which it collects."""

    def __init__(self) -> None:
        self.skeleton = io.BytesIO()
        super().__init__(self.skeleton, protocol=pickle.HIGHEST_PROTOCOL)
        self._tensors: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        # Others than plain ones go their own way.
        if type(obj) is not torch.Tensor or not _is_plain(obj):
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self._tensors)
            self._tensors.append(obj)
        return self._numbers[id(obj)]

    def pack(self) -> tuple[torch.Tensor, list[tuple[int, torch.dtype, tuple[int, ...]]]]:
        """All tensors one after the other, in shared memory, and place, dtype and shape of each."""
        places, end = [], 0
        for tensor in self._tensors:
            places.append((end, tensor.dtype, tuple(tensor.shape)))
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        together = torch.empty(end, dtype=torch.uint8).share_memory_()
        for tensor, place in zip(self._tensors, places, strict=True):
            _view(together, *place).copy_(tensor)
        return together, places


class _Unpacker(pickle.Unpickler):
    def __init__(self, skeleton: bytes, tensors: list[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(skeleton))
        self._tensors = tensors

    def persistent_load(self, pid: int) -> torch.Tensor:
        return self._tensors[pid]


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

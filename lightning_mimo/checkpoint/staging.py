"""Host memory into which a rank copies its tensors for a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

_ALIGNMENT = 64  # bytes
_BLOCK = 2**28  # bytes; a power of two, to which torch rounds pinned memory up


class StagingBuffer:
    """Host memory for the tensors of one checkpoint at a time, reused by the next one.

    Tensors on a GPU are copied to pinned memory, asynchronously and with a single wait for all of them. Pinning memory
    takes longer than the copies, so the memory is kept. It is allocated in blocks, because torch rounds each
    allocation of pinned memory up to a power of two.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._may_pin = True

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(block.numel() for block in self._blocks)

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy tensors to the host. The copies are complete on return, and valid until the next call.

        Args:
            tensors: of any shapes and dtypes, all on the same device.

        Returns:
            For each tensor, a contiguous copy on the CPU.
        """
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        left = sum(_aligned(tensor) for tensor in tensors)
        copies, number, used = [], 0, 0
        for tensor in tensors:
            size = _aligned(tensor)
            while number < len(self._blocks) and self._blocks[number].numel() - used < size:
                number, used = number + 1, 0
            if number == len(self._blocks):
                self._blocks.append(self._allocate(max(size, min(left, _BLOCK)), pinned=on_gpu))
            place = self._blocks[number][used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append(place.copy_(tensor.detach(), non_blocking=on_gpu))
            used, left = used + size, left - size
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        else:
            self._blocks = []  # ordinary memory, which the copies hold, is soon allocated again
        return copies

    def _allocate(self, size: int, *, pinned: bool) -> torch.Tensor:
        if pinned and self._may_pin:
            try:
                return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
            except RuntimeError as error:
                self._may_pin = False
                warnings.warn(
                    f"No pinned memory for a checkpoint ({self.nbytes / 2**20:.0f} MiB are pinned, {size / 2**20:.0f} "
                    f"MiB more are needed): {str(error).splitlines()[0]} Ordinary memory is used, which takes longer. "
                    f"Raise the limit of locked memory (ulimit -l) or the memory of the container.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return torch.empty(size, dtype=torch.uint8, device="cpu")


def _aligned(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT

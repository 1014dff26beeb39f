"""Copies small tensors of the host to this rank's device while the host goes on."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device | int) -> torch.Tensor:
    """Copy a tensor of the CPU to a device, without a wait of the host for work that the device still has to do.

    A GPU reads pageable memory only when it has completed all earlier work of the stream, and the host waits for that.
    From pinned memory it copies when it comes to it. torch keeps the pinned memory until then.

    Args:
        tensor: any dtype and shape, on the CPU.
        device: device of this rank; an integer is the number of a GPU, as from ``torch.cuda.current_device()``.

    Returns:
        The tensor on the device; ``tensor`` itself if that is the CPU.
    """
    device = torch.device(device)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

"""Peak rate of this rank's device, and what is said where it is unknown."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_mimo.observe.peak_flops import peak_flops


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second that a GPU can reach; ``None`` on CPUs. If it is unknown, rank 0 says so.

    Args:
        device: device of this rank.
        dtype: dtype in which the model computes.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = peak_flops(name, dtype)
    if peak is None:
        rank_zero_info(
            f"train/mfu is not logged, only train/tflops_per_gpu: the peak of {name} in "
            f"{str(dtype).removeprefix('torch.')} is not in lightning_mimo/observe/peak_flops.py, which has those of "
            f"NVIDIA's data-center GPUs in bfloat16 and float16."
        )
    return peak

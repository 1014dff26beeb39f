"""Peak rate of matrix products of GPUs, as their manufacturer gives it, in bfloat16 and float16 without sparsity."""

from __future__ import annotations

import re

import torch

# Dense figures of NVIDIA's datasheets, in units of 1e12 operations per second. Where a datasheet gives the rate with
# sparsity, this is half of it. Sources: https://www.nvidia.com/en-us/data-center/h100/, .../h200/, .../a100/, .../a30/,
# .../products/a40/, .../products/a10-gpu/, .../l4/, .../l40/, .../l40s/, .../grace-hopper-superchip/, .../hgx/,
# .../gb200-nvl72/; GeForce: appendix of the architecture whitepapers of GA102 and AD102, with accumulation in float32.
_TERA = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H200 NVL": 835.0,
    "H100": 989.4,
    "H100 NVL": 835.0,
    "H100 PCIE": 756.0,
    "H800": 989.4,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
_DTYPES = (torch.bfloat16, torch.float16)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Floating-point operations per second that a GPU can reach in matrix products.

    Args:
        device_name: as ``torch.cuda.get_device_name()`` gives it, such as ``NVIDIA H100 80GB HBM3``.
        dtype: of the products.

    Returns:
        The peak; ``None`` for a GPU that is not in the table, and for dtypes other than bfloat16 and float16.
    """
    words = set(re.split(r"[\s-]+", device_name.upper()))
    matching = [name for name in _TERA if words >= set(name.split())]
    if dtype not in _DTYPES or not matching:
        return None
    return 1e12 * _TERA[max(matching, key=lambda name: len(name.split()))]

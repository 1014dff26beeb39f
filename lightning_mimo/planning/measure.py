"""Measures a device: how fast its matrix products, attention and memory are, and how long a launch takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from lightning_mimo.planning.hardware import Hardware

_BUDGET = 0.5  # seconds for each figure
_WIDTH, _TOKENS = 4096, 4096
_HEADS, _HEAD, _LENGTH = 16, 128, 2048


def measured(hardware: Hardware, device: torch.device, dtype: torch.dtype) -> Hardware:
    """The same hardware with the rates that a device of this machine reaches; takes a few seconds.

    The links are not measured, because that needs several devices.

    Args:
        hardware: gives peaks, memory and links.
        device: to measure.
        dtype: of the matrix products.
    """
    name = str(dtype).removeprefix("torch.")
    small = 4 if device.type == "cpu" else 1  # a CPU would take seconds for one product
    width, tokens = _WIDTH // small, _TOKENS // small
    one = torch.randn(tokens, width, device=device, dtype=dtype)
    two = torch.randn(width, width, device=device, dtype=dtype)
    query = torch.randn(1, _HEADS // small, _LENGTH // small, _HEAD, device=device, dtype=dtype)
    large = torch.randn(2**26 // small**2, device=device, dtype=dtype)
    other = torch.randn_like(large)
    tiny = torch.zeros(1, device=device, dtype=dtype)
    matmul = 2 * tokens * width * width / _seconds(lambda: one @ two, device)
    attend = (
        4
        * query.shape[1]
        * query.shape[2] ** 2
        * _HEAD
        / _seconds(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query), device)
    )
    moved = 3 * large.nbytes / _seconds(lambda: large + other, device)
    launch = _seconds(lambda: [tiny.add_(1) for _ in range(100)], device) / 100
    # A device can be faster than the file says, where the file is of another one.
    peak = max(hardware.peak(name), matmul)
    return replace(
        hardware,
        name=f"{hardware.name}, measured on this machine's {device.type}",
        sources=(
            *hardware.sources,
            f"measured on this machine, {name}: matrix products {matmul / 1e12:.2f} TFLOP/s, attention "
            f"{attend / 1e12:.2f} TFLOP/s, memory {moved / 1e9:.0f} GB/s, launch {launch * 1e6:.1f} us",
        ),
        flops={**hardware.flops, name: peak},
        matmul_efficiency=matmul / peak,
        attention_efficiency=min(1.0, attend / peak),
        memory_bandwidth=moved,
        launch=launch,
    )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the least of several rounds."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    best, end = float("inf"), time.perf_counter() + _BUDGET
    while time.perf_counter() < end:
        synchronize()
        begin = time.perf_counter()
        for _ in range(3):
            run()
        synchronize()
        best = min(best, (time.perf_counter() - begin) / 3)
    return best

"""Sets CUDA_DEVICE_MAX_CONNECTIONS, the number of hardware queues through which a process launches kernels."""

from __future__ import annotations

import os

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_mimo.layout.layout import MimoLayout


class _CudaEnvironment(LightningEnvironment):
    """Reads and sets the environment variable, which CUDA reads when a process first uses a GPU."""

    _NAME = "CUDA_DEVICE_MAX_CONNECTIONS"

    @property
    def connections(self) -> str | None:
        return os.environ.get(self._NAME)

    @connections.setter
    def connections(self, number: str) -> None:
        os.environ[self._NAME] = number


def set_cuda_connections(layout: MimoLayout, device: torch.device, backend: str | None) -> None:
    """Let CUDA start kernels in the order of their launch where megatron-core relies on it. Not collective.

    With tensor parallelism, megatron-core launches a collective and then the matrix product that hides it. Up to the
    Hopper generation, only a single queue guarantees that they start in this order. A value that is already set stays,
    and megatron-core warns if it is not 1. UCC needs more than one queue.

    Call it before this process uses its GPU.

    Args:
        layout: the run's layout.
        device: device of this rank.
        backend: torch.distributed backend; ``None`` for the default.
    """
    environment = _CudaEnvironment()
    needs_order = any(sizes.tp > 1 for sizes in layout.modules.values())
    if device.type != "cuda" or not needs_order or backend == "ucc" or environment.connections is not None:
        return
    if torch.cuda.is_initialized():
        rank_zero_warn(
            "CUDA_DEVICE_MAX_CONNECTIONS is not set, and this process has already used its GPU, so it is too late to "
            "set it: with tp above 1, collectives may start after the matrix products that are to hide them. Set "
            "CUDA_DEVICE_MAX_CONNECTIONS=1 where the run is started, or use no GPU before Trainer.fit().",
            category=RuntimeWarning,
        )
        return
    environment.connections = "1"

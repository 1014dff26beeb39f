"""What the communicators of all ranks take that are made before the first step: seconds, and memory of the GPU."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lightning_mimo.mimo.communicators import communicators_of
from lightning_mimo.mimo.model import RaggedMimoModel
from lightning_mimo.parallel.communicators import make_communicators
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.strategy import world
from lightning_mimo.upstream.torch import _get_default_store

_PATIENCE = timedelta(seconds=60)


class MeasuredCommunicators:
    """Makes the communicators in the strategy's place, with gloo, too, and measures that.

    Attributes:
        result: empty before they are made. Memory is that of all processes on the GPU, so nothing else may run on it.
    """

    def __init__(self, accelerator: str) -> None:
        self.result: dict[str, Any] = {}
        self._is_gpu = accelerator == "gpu"

    def replace(self) -> None:
        """Take the place of the strategy's function, for the rest of the process."""
        world.connect_ranks = self._connect

    def _connect(self, model: RaggedMimoModel, infra: MimoModelInfra, *, training: bool) -> None:
        if self.result:  # of the training; what follows it has them
            return
        needed = communicators_of(model, infra, training=training)
        _meet("before communicators")
        before, began = self._used(), time.perf_counter()
        make_communicators(infra, needed)
        if self._is_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        _meet("after communicators")
        self.result = {
            "number": len(needed),
            "seconds": seconds,
            # Of all ranks that share this GPU.
            "mib_on_gpu": (self._used() - before) / 2**20 if self._is_gpu else None,
            "planned_mib": sum(each.nbytes for each in needed) / 2**20,
        }

    def _used(self) -> int:
        """Bytes of the GPU that are in use, by any process."""
        if not self._is_gpu:
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free


def _meet(key: str) -> None:
    """Wait for all ranks without a communicator."""
    store, ranks = _get_default_store(), dist.get_world_size()
    if store.add(key, 1) == ranks:
        store.set(f"{key}: all", "yes")
    store.wait([f"{key}: all"], _PATIENCE)

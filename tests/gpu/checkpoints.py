"""How long saving holds a run up, in the foreground and behind it, and how long loading takes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

_AT = 4  # step


class TimeCheckpoints(pl.Callback):
    """Saves in the middle of training and loads what was saved. The strategy must save behind the training.

    Attributes:
        result: seconds and sizes.
    """

    def __init__(self, directory: str, checksums: Callable[[torch.nn.Module], dict[str, int]]) -> None:
        """
        Args:
            directory: where there is room; what is written is removed again.
            checksums: of a module's parameters.
        """
        self._path = Path(directory) / "measured.ckpt"
        self._checksums = checksums
        self.result: dict[str, Any] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx != _AT:
            return
        before = self._checksums(pl_module)
        # The first save also allocates and pins the memory that it copies to.
        self.result["first_save_stalls_s"] = _seconds(lambda: trainer.save_checkpoint(self._path))
        self.result["first_save_then_writes_s"] = _seconds(trainer.strategy.finish_saving)
        self.result["save_stalls_s"] = _seconds(lambda: trainer.save_checkpoint(self._path))
        self.result["save_then_writes_s"] = _seconds(trainer.strategy.finish_saving)
        self.result["pinned_gib"] = trainer.strategy.run.checkpoints.staged_bytes / 2**30
        self.result["gib"] = sum(each.stat().st_size for each in self._path.iterdir()) / 2**30
        self.result["load_s"] = _seconds(lambda: trainer.strategy.load_checkpoint(self._path))
        self.result["loaded_what_was_saved"] = self._checksums(pl_module) == before
        shutil.rmtree(self._path)


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - began

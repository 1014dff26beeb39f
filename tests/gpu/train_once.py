"""Trains the digits model in one process on one device and prints what came of it, as one line of JSON.

``python -m tests.gpu.train_once --accelerator gpu --precision bf16-mixed --width 1024 --layers 12 --recompute``
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from examples.digits.data import DigitsData
from examples.digits.model import DigitsModule
from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.models.sizes import Recompute, TransformerSize

BATCH = 64
SKIPPED_STEPS = 5  # that are not timed


class Measure(pl.Callback):
    """Losses of all steps, and time and host synchronizations of all but the first few."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.seconds = 0.0
        self.syncs: list[str] = []
        self._started = 0.0
        self._caught: Any = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if torch.cuda.is_available() and batch_idx == SKIPPED_STEPS:
            torch.cuda.synchronize()
            self._started = time.perf_counter()
        if torch.cuda.is_available() and batch_idx == SKIPPED_STEPS - 1:
            self._caught = warnings.catch_warnings(record=True)
            self._records = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self._caught is not None:
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            self._caught = None
            self.syncs = [f"{w.filename}:{w.lineno}" for w in self._records if "synchroniz" in str(w.message)]
        self.losses.append(outputs["loss"])

    def on_train_end(self, trainer, pl_module) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self._started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], required=True)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--overlap", action="store_true", help="distributed optimizer with both overlaps")
    arguments = parser.parse_args()

    pl.seed_everything(1)
    size = TransformerSize(
        num_layers=arguments.layers,
        hidden_size=arguments.width,
        num_attention_heads=max(4, arguments.width // 64),
        recompute=Recompute() if arguments.recompute else None,
    )
    ddp = DistributedDataParallelConfig()
    if arguments.overlap:
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
        )
    measure = Measure()
    trainer = pl.Trainer(
        accelerator=arguments.accelerator,
        devices=1,
        precision=arguments.precision,
        strategy=MimoStrategy(
            {"images": ModuleParallelism(), "language": ModuleParallelism()}, BATCH, 2, colocate=True, ddp=ddp
        ),
        max_steps=arguments.steps,
        limit_val_batches=0,
        callbacks=[measure],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DigitsData(global_batch_size=BATCH)
    trainer.fit(DigitsModule(vision=size, language=size, lr=1e-3 * 64 / arguments.width, warmup_steps=10), data)
    timed = arguments.steps - SKIPPED_STEPS
    print(
        json.dumps(
            {
                "losses": [float(loss) for loss in measure.losses],
                "ms_per_step": 1000 * measure.seconds / timed,
                "samples_per_sec": BATCH * timed / measure.seconds if measure.seconds else None,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
                "syncs_in_a_step": measure.syncs,
            }
        )
    )


if __name__ == "__main__":
    main()

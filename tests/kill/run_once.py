"""A run as a user would start it: four processes, a checkpoint every step, going on from the last one if there is one.

``FOLDER [--async-save]`` on the command line; writes ``FOLDER/final.safetensors`` at the end.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_mimo import MimoStrategy, ModuleParallelism, Saving
from lightning_mimo.checkpoint import tools
from tests.kill import STEPS
from tests.parity.model import Model, ParityModule, PicturesSoundsAndText, Samples

PARTS = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}


class Progress(pl.Callback):
    """Tells the driver how far the run is and which processes there are, and leaves it time to strike."""

    def __init__(self, folder: Path, pause: float) -> None:
        self._folder, self._pause = folder, pause

    def on_train_start(self, trainer, pl_module) -> None:
        (self._folder / f"pid{trainer.global_rank}").write_text(str(os.getpid()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.is_global_zero:
            (self._folder / "step").write_text(str(trainer.global_step))
        time.sleep(self._pause)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--pause", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    pl.seed_everything(3)
    folder: Path = arguments.folder
    last = folder / "checkpoints" / "last.ckpt"
    callbacks: list[Any] = [
        Progress(folder, arguments.pause),
        ModelCheckpoint(folder / "checkpoints", filename="last", every_n_train_steps=2, enable_version_counter=False),
    ]
    strategy = MimoStrategy(PARTS, 12, 2, saving=Saving(asynchronous=arguments.async_save))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=4,
        strategy=strategy,
        max_steps=arguments.steps,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(PicturesSoundsAndText(Samples(number=96)), batch_size=12, shuffle=True)
    trainer.fit(ParityModule(Model(dropout=0.2)), loader, ckpt_path="last" if last.exists() else None)
    if trainer.is_global_zero:
        final = folder / "final.safetensors"
        final.unlink(missing_ok=True)  # of a run that was killed after it had written this
        tools.export(last, final)

"""A run over tar shards or a stream, which writes down the samples that it learns from.

``FOLDER --data tar|stream --layout N --attempt K`` on the command line. Reads ``FOLDER/../shards``; goes on from the
last checkpoint in ``FOLDER``, if there is one; writes ``FOLDER/final.safetensors`` at the end.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.checkpoint import tools
from lightning_mimo.data import ShardSampler, StreamDataset, TarShards
from lightning_mimo.layout.module_parallelism import LANGUAGE
from tests.parity.cases import apart, together
from tests.parity.model import Model, ParityModule, PicturesSoundsAndText, Samples
from tests.support.shards import write_tar

SAMPLES, SHARDS, BATCH, STEPS = 45, 5, 12, 14  # four batches in an epoch, of which the last has nine samples
DATASET = PicturesSoundsAndText(Samples(number=SAMPLES))
LAYOUTS = {
    "dp2-tp2": apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
    "dp2-dp2": apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2)),
    "pp2-pp2": apart(ModuleParallelism(pp=2), ModuleParallelism(pp=2)),
    "one-one": apart(ModuleParallelism(), ModuleParallelism()),
    "colocated": together(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
}


def write_shards(folder: Path) -> None:
    folder.mkdir()
    for shard in range(SHARDS):
        samples = []
        for number in range(shard, SAMPLES, SHARDS):
            file = io.BytesIO()
            torch.save(DATASET[number], file)
            samples.append((f"{number:03d}", {"pt": file.getvalue()}))
        write_tar(folder / f"{shard}.tar", samples)


def decode(record: Any, modules: frozenset[str]) -> dict[str, Any]:
    sample = torch.load(io.BytesIO(record["pt"]))
    return sample if "images" in modules else {**sample, "modality_inputs": {}}


class Records(IterableDataset):
    """The same shards as a stream of records, as a pipeline that knows nothing of an index reads them."""

    def __init__(self, shards: str) -> None:
        self._dataset = TarShards(shards, decode)

    def __iter__(self) -> Any:
        return (dict(self._dataset[number]) for number in range(len(self._dataset)))


def loader(shards: Path, data: str) -> DataLoader:
    if data == "tar":
        dataset = TarShards(f"{shards}/*.tar", decode)
        return DataLoader(dataset, sampler=ShardSampler(dataset, shards_at_once=2), num_workers=2)
    return DataLoader(StreamDataset(Records(f"{shards}/*.tar"), decode, shuffle_buffer=10), num_workers=2)


class WritesDown(pl.Callback):
    """Writes the texts of every step, where the loss is computed, and tells the driver how far the run is."""

    def __init__(self, folder: Path, attempt: int) -> None:
        self._folder, self._attempt = folder, attempt
        self._numbers = {tuple(DATASET[number]["input_ids"].tolist()): number for number in range(SAMPLES)}
        assert len(self._numbers) == SAMPLES

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._rank = trainer.global_rank
        layout = pl_module.infra.layout
        held = layout.modules[LANGUAGE].coordinates(self._rank) if LANGUAGE in layout.modules_on(self._rank) else None
        self._writes = held is not None and held["tp"] == 0 and held["pp"] == layout.modules[LANGUAGE].pp - 1
        if trainer.is_global_zero:
            self._write({"attempt": self._attempt, "begins": trainer.global_step})
        (self._folder / f"pid{self._rank}").write_text(str(os.getpid()))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._writes:
            samples = [
                self._numbers[tuple(ids[:length].tolist())]
                for each in batch
                for ids, length, is_padding in zip(each["input_ids"], each["lengths"], each["is_padding"], strict=True)
                if not is_padding
            ]
            self._write({"attempt": self._attempt, "step": trainer.global_step, "samples": samples})
        if trainer.is_global_zero:
            (self._folder / "step").write_text(str(trainer.global_step))
        time.sleep(0.1)

    def _write(self, entry: dict[str, Any]) -> None:
        with (self._folder / f"learned{self._rank}.jsonl").open("a") as lines:
            lines.write(json.dumps(entry) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", choices=["tar", "stream"])
    parser.add_argument("--layout", choices=LAYOUTS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--attempt", type=int)
    arguments = parser.parse_args()
    pl.seed_everything(3)
    folder: Path = arguments.folder
    layout = LAYOUTS[arguments.layout]
    last = folder / "checkpoints" / "last.ckpt"
    callbacks: list[Any] = [
        WritesDown(folder, arguments.attempt),
        ModelCheckpoint(folder / "checkpoints", filename="last", every_n_train_steps=3, enable_version_counter=False),
    ]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=layout.ranks,
        strategy=MimoStrategy(dict(layout.modules), BATCH, layout.num_microbatches, colocate=layout.colocate),
        precision="64-true",
        max_steps=arguments.steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    shards = folder.parent / "shards"
    trainer.fit(ParityModule(Model()), loader(shards, arguments.data), ckpt_path="last" if last.exists() else None)
    trainer.save_checkpoint(folder / "end.ckpt")
    if trainer.is_global_zero:
        tools.export(folder / "end.ckpt", folder / "final.safetensors")

"""Seconds and bytes of a checkpoint, from 2 to 8 ranks.

Each figure is the median of several saves or loads in one run, the longest over the ranks. Saving behind the training
is measured by what the training waits for (the stall), and by how long it takes until the checkpoint is there.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch.utils.data import DataLoader

from examples.digits.data import DigitsData
from examples.digits.model import DigitsModule
from lightning_mimo import MimoStrategy, ModuleParallelism, Saving
from lightning_mimo.models.sizes import TransformerSize
from tests.benchmarks.quiet import quiet_trainer
from tests.benchmarks.report import Report
from tests.parity.layouts import PoolEnvironment
from tests.support.rank_pool import RankPool

LAYOUTS = {  # name -> modules, ranks
    "images_dp1-language_tp1": ({"images": ModuleParallelism(), "language": ModuleParallelism()}, 2),
    "images_dp2-language_tp2": ({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}, 4),
    "images_dp4-language_tp4": ({"images": ModuleParallelism(dp=4), "language": ModuleParallelism(tp=4)}, 8),
}
SMALL = TransformerSize(num_layers=2, hidden_size=64, num_attention_heads=4)
MODELS = {
    "digits": (SMALL, TransformerSize(num_layers=3, hidden_size=64, num_attention_heads=4)),
    "large": (SMALL, TransformerSize(num_layers=4, hidden_size=1024, num_attention_heads=8)),
}
TIMES = 5


class Measures(pl.Callback):
    """Saves and loads after the first step."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.waited: list[float] = []
        self.there: list[float] = []
        self.loaded: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        strategy = trainer.strategy
        for _ in range(TIMES):
            dist.barrier()
            began = time.perf_counter()
            trainer.save_checkpoint(self._path)
            self.waited.append(time.perf_counter() - began)
            strategy.finish_saving()
            self.there.append(time.perf_counter() - began)
        for _ in range(TIMES):
            self.loaded.append(_seconds(lambda: strategy.load_checkpoint(self._path)))


def _seconds(step: Callable[[], object]) -> float:
    dist.barrier()
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def _save_and_load(model: str, layout: str, path: str, async_save: bool) -> tuple[float, float, float]:
    """Seconds that training waits, until the checkpoint is there, and of a load."""
    vision, language = MODELS[model]
    measures = Measures(path)
    saving = Saving(asynchronous=async_save)
    strategy = MimoStrategy(dict(LAYOUTS[layout][0]), 8, saving=saving, cluster_environment=PoolEnvironment())
    trainer = quiet_trainer(strategy, max_steps=1, callbacks=[measures])
    data = DigitsData(global_batch_size=8, train_samples=64, val_samples=8)
    data.setup("fit")
    module = DigitsModule(vision=vision, language=language)
    trainer.fit(module, DataLoader(data.train_set, batch_size=8))
    strategy.infra.destroy()
    waited, there, loaded = map(statistics.median, (measures.waited, measures.there, measures.loaded))
    return waited, there, loaded


def measure(pool: RankPool, *, quick: bool) -> Report:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in ["digits"] if quick else MODELS:
            for layout, (_, ranks) in LAYOUTS.items():
                path = str(Path(folder) / "some.ckpt")
                here = pool.run(_save_and_load, model, layout, path, False, world_size=ranks, timeout=400)
                behind = pool.run(_save_and_load, model, layout, path, True, world_size=ranks, timeout=400)
                size = sum(file.stat().st_size for file in Path(path).iterdir())
                save, load = max(each[1] for each in here), max(each[2] for each in here)
                stall, there = max(each[0] for each in behind), max(each[1] for each in behind)
                rows.append((model, layout, ranks, size, save, load, stall, there))
    return Report(
        title="A checkpoint: seconds, the longest over the ranks, and bytes",
        columns=("model", "layout", "ranks", "bytes", "save", "load", "async: stall", "async: there"),
        rows=rows,
        notes=("Medians of several saves and loads. stall: what training waits for; there: until it is complete.",),
    )

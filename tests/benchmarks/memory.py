"""What each rank holds, also while the model is being built and a checkpoint loaded, against the whole model at once.

Each layout has ranks of its own, just started. A thread looks at the memory that is the process's own every 2 ms.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from examples.digits.data import DigitsData
from examples.digits.model import DigitsModule
from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.models.sizes import TransformerSize
from tests.benchmarks.quiet import quiet_trainer
from tests.benchmarks.report import Cell, Report
from tests.parity.layouts import Layout, PoolEnvironment
from tests.support.rank_pool import RankPool
from tests.support.resident import PeakMemory, counted_parameters

VISION = TransformerSize(num_layers=3, hidden_size=768, num_attention_heads=8)
LANGUAGE = TransformerSize(num_layers=4, hidden_size=1024, num_attention_heads=8)
ALONE = "one process"
LAYOUTS = {
    ALONE: Layout(modules={"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1)}, colocate=True),
    "images_dp1-language_dp1": Layout(modules={"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1)}),
    "images_dp1-language_tp2": Layout(
        modules={"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2, dp=1)}
    ),
    "images_dp1-language_pp2": Layout(
        modules={"images": ModuleParallelism(dp=1), "language": ModuleParallelism(pp=2, dp=1)}
    ),
    "colocated images_tp2-language_tp2": Layout(
        modules={"images": ModuleParallelism(tp=2, dp=1), "language": ModuleParallelism(tp=2, dp=1)}, colocate=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one rank held, in bytes.

    Attributes:
        modules: of this rank.
        weights: parameters at the end.
        made: all parameters that were ever made.
        peaks: stage -> most of its own memory during it.
    """

    modules: tuple[str, ...]
    weights: int
    made: int
    peaks: Mapping[str, int]


class Stages(pl.Callback):
    """Takes the peaks, and saves and loads a checkpoint after the first step."""

    def __init__(self, memory: PeakMemory, path: Path) -> None:
        self._memory, self._path = memory, path
        self.peaks: dict[str, int] = {}

    def on_fit_start(self, *args: Any) -> None:
        self.peaks["construction"] = self._memory.take()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.peaks["first step"] = self._memory.take()
        trainer.save_checkpoint(self._path)
        trainer.strategy.finish_saving()
        self.peaks["saving"] = self._memory.take()
        trainer.strategy.load_checkpoint(self._path)
        self.peaks["loading"] = self._memory.take()


def run(layout: Layout, path: Path, vision: TransformerSize = VISION, language: TransformerSize = LANGUAGE) -> Held:
    """Train a step of the digits model, save and load, and say what this rank held. Collective over the world."""
    strategy = MimoStrategy(dict(layout.modules), 8, colocate=layout.colocate, cluster_environment=PoolEnvironment())
    data = DigitsData(global_batch_size=8, train_samples=8, val_samples=8)
    data.setup("fit")
    module = DigitsModule(vision=vision, language=language)
    with PeakMemory() as memory, counted_parameters() as made:
        stages = Stages(memory, path)
        trainer = quiet_trainer(strategy, max_steps=1, callbacks=[stages])
        trainer.fit(module, DataLoader(data.train_set, batch_size=8))
    held = Held(
        modules=tuple(strategy.infra.participating_modules),
        weights=_bytes(module.model.parameters()),
        made=_bytes(made.values()),
        peaks=stages.peaks,
    )
    strategy.infra.destroy()
    return held


def _bytes(parameters: Any) -> int:
    return sum(parameter.nbytes for parameter in parameters if isinstance(parameter, torch.Tensor))


def measure(pool: RankPool, *, quick: bool) -> Report:
    rows: list[list[Cell]] = []
    whole: Held | None = None
    for name, layout in LAYOUTS.items():
        if quick and name not in (ALONE, "images_dp1-language_dp1"):
            continue
        fresh = RankPool(layout.ranks)
        with tempfile.TemporaryDirectory() as folder:
            held = fresh.run(run, layout, Path(folder) / "some.ckpt", world_size=layout.ranks, timeout=400)
        fresh.close()
        whole = whole or held[0]
        for rank, each in enumerate(held):
            peaks = [each.peaks[stage] / whole.peaks[stage] for stage in whole.peaks]
            who = f"{rank}: {', '.join(each.modules)}"
            rows.append(
                [name, who, each.weights / 2**20, each.weights / whole.weights, each.made / each.weights, *peaks]
            )
    assert whole is not None
    peaks = ", ".join(f"{stage} {peak / 2**20:.0f} MiB" for stage, peak in whole.peaks.items())
    return Report(
        title="Peak memory of each rank, over that of the whole model in one process at the same stage",
        columns=("layout", "rank", "MiB", "weights", "made/held", *whole.peaks),
        rows=rows,
        notes=(
            "weights: of this rank, over those of the model. made/held: parameters ever made on it over those it has.",
            f"float32, Adam. In one process: {peaks}, over what the process had at the start of fit().",
        ),
    )

"""One training, from launch to the first optimizer step; each rank writes when it got where.

``python -m tests.benchmarks.launch_once FOLDER RANKS BEGAN``, with the moment of the launch in seconds since 1970.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, override

import lightning.pytorch as pl
from torch.utils.data import DataLoader

import lightning_mimo.commands.run  # noqa: F401  (what lightning-mimo fit imports)
from examples.digits.data import DigitsData
from examples.digits.model import DigitsModule
from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.models.sizes import TransformerSize
from tests.benchmarks.quiet import quiet_trainer

SIZE = TransformerSize(num_layers=2, hidden_size=64, num_attention_heads=4)


class Marks(dict[str, float]):
    def reach(self, what: str) -> None:
        """From the mark before to now, it was this."""
        self[what] = time.time()


class TimedStrategy(MimoStrategy):
    marks: Marks

    @override
    def setup_environment(self) -> None:
        self.marks.reach("fork")
        super().setup_environment()
        self.marks.reach("process groups")

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self.marks.reach("model")
        super().setup(trainer)
        self.marks.reach("DDP, optimizer")


class Clock(pl.Callback):
    def __init__(self, marks: Marks, folder: str) -> None:
        self._marks, self._folder = marks, Path(folder)

    def on_train_batch_start(self, *args: Any) -> None:
        self._marks.reach("loaders, first batch")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._marks.reach("first step")
        (self._folder / f"{trainer.global_rank}.json").write_text(json.dumps(self._marks))


def main(folder: str, ranks: int, began: float) -> None:
    marks = Marks({"launch": began})
    marks.reach("imports")
    half = ranks // 2
    tp = min(4, half)
    strategy = TimedStrategy(
        {"images": ModuleParallelism(dp=half), "language": ModuleParallelism(tp=tp, dp=half // tp)}, 2 * ranks
    )
    strategy.marks = marks
    data = DigitsData(global_batch_size=2 * ranks, train_samples=4 * ranks, val_samples=ranks)
    data.setup("fit")
    marks.reach("data")
    trainer = quiet_trainer(strategy, devices=ranks, max_steps=1, callbacks=[Clock(marks, folder)])
    trainer.fit(DigitsModule(vision=SIZE, language=SIZE), DataLoader(data.train_set, batch_size=2 * ranks))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))

"""A batch goes by a shorter way than Lightning's: with the same hooks in the same order, and the same counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import SimpleProfiler

from lightning_mimo import ModuleParallelism
from tests.parity.cases import apart, task
from tests.parity.layouts import train
from tests.parity.model import Model, ParityModule, PicturesSoundsAndText, Samples
from tests.support.logged import Logged, in_csv
from tests.support.rank_pool import RankPool

LAYOUT = apart(ModuleParallelism(), ModuleParallelism(tp=2))
BATCHES, WINDOW, STEPS = 5, 2, 7  # the last window of an epoch has one batch; the third epoch ends early
Record = tuple[Any, ...]
HOOKS = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
)


class Records(pl.Callback):
    """Every hook, where the run is, and what callbacks see then."""

    def __init__(self) -> None:
        self.found: list[Record] = []


def _recording(name: str) -> Any:
    def hook(self: Records, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        metrics = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if not key.startswith("telemetry/") and not key.endswith("_per_sec")
        }
        where = trainer.current_epoch, trainer.global_step, module._current_fx_name
        of_batch = ()
        if name == "on_train_batch_end":
            outputs, batch, batch_idx = args
            of_batch = float(outputs["loss"]), len(batch), batch_idx
        self.found.append((name, *where, *of_batch, metrics))

    return hook


for _name in HOOKS:
    setattr(Records, _name, _recording(_name))


class Logs(ParityModule):
    """Logs in hooks of its own, and has a learning rate that falls with every step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("own/lr", optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("own/batch", float(batch_idx), on_step=True, on_epoch=True, prog_bar=True, batch_size=1)


class StartsItself(Logs):
    """One of the hooks that Lightning's own way is taken for."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return None


class EndsEarly(Logs):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None


def run(
    kind: type[ParityModule], folder: Path, *, short: bool, profiler: SimpleProfiler | None = None
) -> tuple[list[Record], dict[str, Any], Logged]:
    """What was recorded, Lightning's counts at the end, and what was written down."""
    records = Records()
    theirs = _TrainingEpochLoop.advance
    with mock.patch.object(_TrainingEpochLoop, "advance", autospec=True, side_effect=theirs) as advance:
        _, module, strategy = train(
            task(accumulate=WINDOW, steps=STEPS, samples=Samples(number=BATCHES * 6), batch=6),
            LAYOUT,
            module=kind(Model()),
            validation=PicturesSoundsAndText(Samples(number=6)),
            callbacks=[records],
            logger=CSVLogger(folder),
            log_every_n_steps=2,
            profiler=profiler,
        )
    assert (advance.call_count == 0) == short
    counts = module.trainer.fit_loop.state_dict()
    strategy.infra.destroy()
    return records.found, counts, in_csv(folder) if strategy.is_global_zero else {}


def without_times(logged: Logged) -> Logged:
    return {
        name: values
        for name, values in logged.items()
        if not name.endswith("_per_sec") and not name.startswith("telemetry/")
    }


@pytest.mark.parametrize(("kind", "profiled"), [(StartsItself, False), (Logs, True)], ids=["own hook", "profiler"])
def test_short_way_is_lightnings(rank_pool: RankPool, tmp_path: Path, kind: type[Logs], profiled: bool) -> None:
    profiler = SimpleProfiler() if profiled else None
    short = rank_pool.run(run, Logs, tmp_path / "short", short=True, world_size=LAYOUT.ranks)
    long = rank_pool.run(run, kind, tmp_path / "long", short=False, profiler=profiler, world_size=LAYOUT.ranks)
    for (records, counts, logged), (records_of_long, counts_of_long, logged_of_long) in zip(short, long, strict=True):
        assert records == records_of_long
        assert counts == counts_of_long
        assert without_times(logged) == without_times(logged_of_long)
    records, _, logged = short[0]
    ends = [record for record in records if record[0] == "on_train_batch_end"]
    assert [record[5 + 1] for record in ends] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1], "the batch's number"
    assert [record[2] for record in ends] == [0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7], "optimizer steps"
    assert {"own/lr", "own/batch_step", "train/loss", "train/grad_norm/language"} <= logged.keys()
    assert [step for step, _ in logged["train/loss"]] == [1, 3, 5]


def test_a_module_may_end_the_epoch(rank_pool: RankPool, tmp_path: Path) -> None:
    for records, *_ in rank_pool.run(run, EndsEarly, tmp_path, short=False, world_size=LAYOUT.ranks):
        ends = [record for record in records if record[0] == "on_train_batch_end"]
        assert [record[5 + 1] for record in ends][:6] == [0, 1, 2, 0, 1, 2]


class Breaks(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == 2:
            self.loss = float(trainer.callback_metrics["train/loss"])
            self.shown = trainer.progress_bar_metrics["train/loss"]
            raise InterruptedError


def break_off() -> None:
    breaks, module = Breaks(), ParityModule(Model())
    with pytest.raises(InterruptedError):
        train(task(steps=4), LAYOUT, module=module, callbacks=[breaks])
    kept = module.trainer.callback_metrics["train/loss"]
    assert float(kept) == breaks.loss == pytest.approx(breaks.shown)
    assert float(module.trainer.logged_metrics["train/loss"]) == breaks.loss
    module.trainer.strategy.infra.destroy()


def test_metrics_of_the_last_batch_are_kept_where_training_breaks_off(rank_pool: RankPool) -> None:
    rank_pool.run(break_off, world_size=LAYOUT.ranks)

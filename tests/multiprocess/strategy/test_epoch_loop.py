"""What callbacks, loggers and the progress bar find in every batch, and where an epoch ends before its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_mimo import ModuleParallelism
from tests.parity.cases import apart, task
from tests.parity.layouts import train
from tests.parity.model import Model, ParityModule, PicturesSoundsAndText, Samples
from tests.support.logged import Logged, in_csv
from tests.support.rank_pool import RankPool

LAYOUT = apart(ModuleParallelism(), ModuleParallelism(tp=2))
BATCHES, WINDOW, STEPS = 5, 2, 7  # the last window of an epoch has one batch; the third epoch ends early


Seen = list[tuple[int, int, float, dict[str, float]]]
"""In every ``on_train_batch_end``: the batch, the steps that are done, its loss, and the metrics of callbacks."""


class Sees(pl.Callback):
    def __init__(self) -> None:
        self.found: Seen = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        outputs, _, batch_idx = args
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.found.append((batch_idx, trainer.global_step, float(outputs["loss"]), metrics))


class Logs(ParityModule):
    """Logs in hooks of its own, and has a learning rate that falls with every step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("own/lr", optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("own/batch", float(batch_idx), on_step=True, on_epoch=True, prog_bar=True, batch_size=1)


class EndsEarly(Logs):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None


def run(kind: type[ParityModule], folder: Path) -> tuple[Seen, Logged, dict[str, Any]]:
    """What callbacks saw, what was written down, and Lightning's counts at the end."""
    sees = Sees()
    _, module, strategy = train(
        task(accumulate=WINDOW, steps=STEPS, samples=Samples(number=BATCHES * 6), batch=6),
        LAYOUT,
        module=kind(Model()),
        validation=PicturesSoundsAndText(Samples(number=6)),
        callbacks=[sees],
        logger=CSVLogger(folder),
        log_every_n_steps=2,
    )
    counts = module.trainer.fit_loop.state_dict()
    strategy.infra.destroy()
    return sees.found, in_csv(folder) if strategy.is_global_zero else {}, counts


def test_every_batch_is_seen_and_every_second_step_logged(rank_pool: RankPool, tmp_path: Path) -> None:
    ranks = rank_pool.run(run, Logs, tmp_path, world_size=LAYOUT.ranks)
    for seen, _, counts in ranks:
        assert [batch for batch, *_ in seen] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
        assert [steps for _, steps, *_ in seen] == [0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7]
        assert counts["epoch_loop.batch_progress"]["total"]["completed"] == 12
        done = counts["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        assert done["step"]["total"] == {"ready": STEPS, "completed": STEPS}
        assert done["zero_grad"]["total"] == {"ready": STEPS, "started": STEPS, "completed": STEPS}
        for _, _, loss, metrics in seen:
            # Lightning divides the loss that it hands to callbacks.
            assert metrics["train/loss"] / WINDOW == pytest.approx(loss), "of this batch, not of an earlier one"
        norms = [metrics.get("train/grad_norm") for *_, metrics in seen]
        assert norms[0] is None and norms[1] is not None, "there is none before the first step"
        assert norms[1] == norms[2] != norms[3], "callbacks keep the last one"
        assert [metrics["own/lr"] for *_, metrics in seen[1:4]] == pytest.approx([1e-2, 1e-2, 5e-3])
    logged = ranks[0][1]
    assert {"own/lr", "own/batch_step", "train/loss", "train/grad_norm/language"} <= logged.keys()
    after = {steps: metrics for _, steps, _, metrics in reversed(ranks[0][0])}
    for name in ("train/loss", "train/grad_norm", "own/lr"):
        assert [step for step, _ in logged[name]] == [1, 3, 5], name
        assert [value for _, value in logged[name]] == pytest.approx([after[step + 1][name] for step in (1, 3, 5)])


def test_a_module_may_end_the_epoch(rank_pool: RankPool, tmp_path: Path) -> None:
    for seen, *_ in rank_pool.run(run, EndsEarly, tmp_path, world_size=LAYOUT.ranks):
        assert [batch for batch, *_ in seen][:6] == [0, 1, 2, 0, 1, 2]


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

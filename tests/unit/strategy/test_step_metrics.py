"""Where the metrics of a step are shown."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_mimo.strategy.step_metrics import StepMetrics
from tests.support.logged import in_csv

EVERY = 3


class Once(pl.LightningModule):
    """Shows a metric in every batch; in the second of three as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[dict[str, float]] = []
        self.in_bar: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        metrics, step = StepMetrics(self.trainer), self.global_step
        if step == 1:
            metrics.show_tensors({"train/loss": torch.tensor(1.0)})
        else:
            metrics.show({"train/loss": step, "telemetry/compute_s": 0.5}, prog_bar=["train/loss"])

    def on_train_batch_end(self, *args: Any) -> None:
        metrics = self.trainer.callback_metrics
        assert all(value.device.type == "cpu" and value.dtype == torch.float32 for value in metrics.values())
        self.seen.append({name: float(value) for name, value in metrics.items()})
        self.in_bar.append(dict(self.trainer.progress_bar_metrics))


@pytest.fixture
def trained(tmp_path: Path) -> Once:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders and loggers
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=4,
            logger=CSVLogger(tmp_path),
            log_every_n_steps=EVERY,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module := Once(), torch.utils.data.DataLoader(torch.ones(8, 1)))
    return module


def test_callbacks_see_every_batch(trained: Once) -> None:
    assert [seen["train/loss"] for seen in trained.seen] == [0.0, 1.0, 2.0, 3.0]
    assert [seen["telemetry/compute_s"] for seen in trained.seen] == [0.5] * 4, "the last one is kept"


def test_progress_bar_does_not_wait_for_tensors(trained: Once) -> None:
    assert [bar["train/loss"] for bar in trained.in_bar] == [0, 0, 2, 3]
    assert all(bar.keys() <= {"train/loss", "v_num"} for bar in trained.in_bar)


def test_loggers_get_what_is_of_their_steps(trained: Once, tmp_path: Path) -> None:
    assert in_csv(tmp_path) == {"train/loss": [(2, 2.0)], "telemetry/compute_s": [(2, 0.5)]}

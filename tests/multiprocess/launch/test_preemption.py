"""A run that is told to end saves where it is, on all ranks alike, and loses nothing."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.checkpoint.directory import read_manifest
from tests.parity.cases import apart, task
from tests.parity.layouts import PoolEnvironment, train, weights
from tests.parity.model import PicturesSoundsAndText, Samples
from tests.parity.oracle import Tensors
from tests.support.evaluation import PicturesAndText, Run, TinyModule, make_trainer
from tests.support.rank_pool import RankPool
from tests.support.tiers import exhaustive

RUN = task(dropout=0.3, samples=Samples(number=36), steps=5)
LAYOUT = apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2))
HELD_OUT = Samples(number=30)
TOLD = 1
"""The rank that gets the signal: neither the first one nor one that sees a loss."""


class Tells(pl.Callback):
    """Sends a signal to this process in the second batch of the validation after some step, on one rank only."""

    def __init__(self, step: int | None) -> None:
        self._step = step
        self.strategy: Any = None
        self.validations: list[float] = []

    def on_fit_start(self, trainer, pl_module) -> None:
        self.strategy = trainer.strategy

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == 1 and trainer.global_step == self._step and trainer.global_rank == TOLD:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_end(self, trainer, pl_module) -> None:
        self.validations.append(float(trainer.callback_metrics["val/loss"]))


@dataclass(frozen=True, kw_only=True)
class End:
    """How a run ended on a rank."""

    losses: list[float] = field(default_factory=list)
    validations: list[float]
    weights: Tensors = field(default_factory=dict)


def fit(folder: str, interval: int | float, *, told_after: int | None = None, ckpt_path: str | None = None) -> End:
    """Train, and be told to end in the validation after a step."""
    tells = Tells(told_after)
    options: dict[str, Any] = {
        "callbacks": [tells],
        "validation": PicturesSoundsAndText(HELD_OUT),
        "default_root_dir": folder,
        "val_check_interval": interval,
        "num_sanity_val_steps": 0,
    }
    if told_after is not None:
        with pytest.raises(SystemExit):
            train(RUN, LAYOUT, **options)
        end = End(validations=tells.validations)
    else:
        recorder, module, strategy = train(RUN, LAYOUT, ckpt_path=ckpt_path, **options)
        end = End(losses=recorder.losses, validations=tells.validations, weights=weights(module.model, strategy.infra))
    tells.strategy.infra.destroy()
    return end


@pytest.mark.parametrize(
    ("interval", "step", "validations_before"), [(2, 2, 0), exhaustive(1.0, 3, 0)], ids=["in_an_epoch", "at_its_end"]
)
def test_run_that_is_told_to_end_in_a_validation_does_it_again(
    rank_pool: RankPool, tmp_path: Path, interval: int | float, step: int, validations_before: int
) -> None:
    folder = str(tmp_path)
    left_alone = rank_pool.run(fit, folder, interval, world_size=4)
    told = rank_pool.run(fit, folder, interval, told_after=step, world_size=4)
    path = tmp_path / "last-preempted.ckpt"
    assert read_manifest(path)["step"] == step
    went_on = rank_pool.run(fit, folder, interval, ckpt_path=str(path), world_size=4)
    for alone, first, second in zip(left_alone, told, went_on, strict=True):
        assert len(first.validations) == validations_before
        assert first.validations + second.validations == alone.validations
        assert second.losses == alone.losses[step:]
        assert all(torch.equal(second.weights[name], tensor) for name, tensor in alone.weights.items())


class TellsWhileEvaluating(pl.Callback):
    def __init__(self) -> None:
        self.batches = 0

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._tell(trainer)

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._tell(trainer)

    def _tell(self, trainer: pl.Trainer) -> None:
        self.batches += 1  # after the package's own callback would have ended the run
        if self.batches == 1 and trainer.global_rank == TOLD:
            os.kill(os.getpid(), signal.SIGTERM)


def evaluate(entry_points: tuple[str, ...]) -> list[int]:
    """Number of batches that each entry point ran before it ended."""
    batches = []
    for name in entry_points:
        tells = TellsWhileEvaluating()
        strategy = MimoStrategy(dict(LAYOUT.modules), 12, 2, cluster_environment=PoolEnvironment())
        trainer = make_trainer(Run(), strategy, callbacks=[tells])
        with pytest.raises(SystemExit):
            getattr(trainer, name)(TinyModule(), DataLoader(PicturesAndText(36), batch_size=12))
        batches.append(tells.batches)
        strategy.infra.destroy()
    return batches


def test_evaluation_ends_on_all_ranks_after_the_same_batch(rank_pool: RankPool) -> None:
    for batches in rank_pool.run(evaluate, ("test", "predict"), world_size=4):
        assert batches == [2, 2]

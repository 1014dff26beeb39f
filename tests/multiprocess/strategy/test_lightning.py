"""Loggers, callbacks and options of Lightning's Trainer where rank 0 is an encoder's, and the loss on the last."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.profilers import SimpleProfiler
from torch.utils.data import DataLoader

from lightning_mimo import MimoStrategy, ModuleParallelism
from tests.parity.layouts import PoolEnvironment
from tests.support.evaluation import SEED, PicturesAndText, TinyModule
from tests.support.logged import in_csv, in_tensorboard, in_wandb
from tests.support.rank_pool import RankFailure, RankPool

# Rank 0 is the encoder's, rank 1 the first stage of the language module, rank 2, where the loss is, the last.
PIPELINE = {"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1, pp=2)}
BATCH = 12


class Module(TinyModule):
    """With a learning-rate schedule that goes down by a tenth each step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ValidatesOnTwo(Module):
    """Lightning asks for the third argument where there are several DataLoaders, and refuses it where there is one."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        assert dataloader_idx in (0, 1)
        return super().validation_step(batch, batch_idx)


class Events(pl.Callback):
    """What happened, in order: the loss of each batch as callbacks get it, each validation, each optimizer step."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append((f"step {trainer.global_step}", float(outputs["loss"])))

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.seen += [(name, float(value)) for name, value in trainer.callback_metrics.items() if "val/" in name]


def fit(
    modules: Mapping[str, ModuleParallelism] | None = None,
    *,
    module: pl.LightningModule | None = None,
    callbacks: Sequence[pl.Callback] = (),
    val_loaders: int = 1,
    samples: int = 48,
    **options: Any,
) -> tuple[pl.Trainer, Events]:
    """Train on the ranks of the pool; all modules on one rank if none are given. Collective over the world."""
    torch.manual_seed(SEED)
    colocate = modules is None
    modules = modules or {"images": ModuleParallelism(), "language": ModuleParallelism()}
    strategy = MimoStrategy(modules, BATCH, 2, colocate=colocate, cluster_environment=PoolEnvironment())
    events = Events()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        callbacks=[events, *callbacks],
        **{"enable_checkpointing": False, "max_epochs": 2, **({} if options.get("barebones") else quiet), **options},
    )
    train, *validate = [
        DataLoader(PicturesAndText(size), batch_size=BATCH) for size in (samples, *[2 * BATCH] * val_loaders)
    ]
    trainer.fit(module or (Module() if val_loaders == 1 else ValidatesOnTwo()), train, validate)
    return trainer, events


# ---- loggers, progress bars, and what decides by metrics


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank saw of a run."""

    losses: list[float]
    metrics: dict[str, float]
    stopped_epoch: int
    best: tuple[str, str]
    bar: str
    messages: str


def fit_with_everything(folder: str, bar: type[pl.Callback], summary: type[ModelSummary]) -> Seen:
    # Describing the run as a job of its service makes wandb import its launcher, for nine seconds.
    wandb_logger = WandbLogger(save_dir=folder, offline=True, settings={"disable_job_creation": True})
    loggers = [CSVLogger(folder), TensorBoardLogger(folder), wandb_logger]
    stopping = EarlyStopping("val/loss", mode="max", patience=1)  # the loss falls, so this stops
    best = [
        ModelCheckpoint(f"{folder}/{name}", "{step}", monitor=f"{name}/loss", every_n_train_steps=every)
        for name, every in (("val", None), ("train", 1))
    ]
    monitor = LearningRateMonitor(logging_interval="step")
    console = {"console_kwargs": {"force_terminal": True, "width": 300}} if bar is RichProgressBar else {}
    with contextlib.redirect_stdout(io.StringIO()) as out, messages() as told:
        trainer, events = fit(
            PIPELINE,
            callbacks=[stopping, monitor, *best, bar(**console), summary(max_depth=2), Timer(timedelta(hours=1))],
            logger=loggers,
            enable_progress_bar=True,
            enable_model_summary=True,
            enable_checkpointing=True,
            max_epochs=5,
            max_time="00:01:00:00",
            val_check_interval=2,
            num_sanity_val_steps=1,
            log_every_n_steps=1,
            deterministic=True,
            detect_anomaly=True,
            profiler=SimpleProfiler(folder, "profile"),
        )
        for logger in loggers:
            logger.finalize("success")
        if trainer.is_global_zero:
            loggers[2].experiment.finish()
    torch.use_deterministic_algorithms(False)
    result = Seen(
        losses=[value for name, value in events.seen if name.startswith("step")],
        metrics={name: float(value) for name, value in trainer.callback_metrics.items()},
        stopped_epoch=stopping.stopped_epoch,
        best=tuple(Path(each.best_model_path).name for each in best),
        bar=out.getvalue(),
        messages=told.getvalue(),
    )
    trainer.strategy.infra.destroy()
    return result


@contextlib.contextmanager
def messages() -> Iterator[io.StringIO]:
    """What Lightning tells on this rank."""
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    yield told
    logger.removeHandler(handler)


METRICS = {
    *("train/loss", "train/grad_norm", "train/grad_norm/images", "train/grad_norm/language"),
    *("train/skipped_steps", "train/tokens_per_sec", "train/tflops_per_gpu", "train/padding"),
    *("val/loss", "val/exact_match"),
    *("lr-MimoTorchOptimizer/images", "lr-MimoTorchOptimizer/language"),
}
TABLE = """\
name                       type                        parameters   trainable   ranks   per rank
--------------------------------------------------------------------------------------------------------
images                     PipelinedVisionSubmodules   30.9 K       all         0       30.9 K
images.encoders            ModuleDict                  25.8 K       all         0       25.8 K
images.input_projections   ModuleList                  5.2 K        all         0       5.2 K
language                   LanguageModel               27.5 K       all         1-2     13.7 K to 13.8 K
language.embedding         LanguageModelEmbedding      1.0 K        all         1       1.0 K
language.decoder           TransformerBlock            25.5 K       all         1-2     12.7 K to 12.8 K
language.output_layer      ColumnParallelLinear        1.0 K        all         2       1.0 K
--------------------------------------------------------------------------------------------------------
all                                                    58.5 K       all         0-2     13.7 K to 30.9 K
"""


@pytest.mark.parametrize(
    ("bar", "summary"),
    [(TQDMProgressBar, ModelSummary), pytest.param(RichProgressBar, RichModelSummary, marks=pytest.mark.exhaustive)],
    ids=["tqdm", "rich"],
)
def test_loggers_bars_and_deciders_get_every_metric_once(rank_pool, tmp_path, bar, summary) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("rich")
    found = rank_pool.run(fit_with_everything, str(tmp_path), bar, summary, world_size=3)
    first, *others = found
    for other in others:
        assert not other.bar and "name  " not in other.messages
        assert (other.losses, other.stopped_epoch, other.best) == (first.losses, first.stopped_epoch, first.best)
        own_clock = {"train/tokens_per_sec": first.metrics["train/tokens_per_sec"]}
        assert {**other.metrics, **own_clock} == first.metrics
    assert first.stopped_epoch == 1 and len(first.losses) == 6, "stopped at the third of the validations, in epoch 1"
    assert first.best == ("step=6.ckpt", f"step={1 + first.losses.index(min(first.losses))}.ckpt")
    assert (tmp_path / "val" / first.best[0]).is_dir() and (tmp_path / "train" / first.best[1]).is_dir()
    for shown in ("train/loss", "train/tokens_per_sec", "val/loss", "val/exact_match", "2/4"):
        assert shown in first.bar, f"the progress bar does not show {shown}"
    assert TABLE in first.messages
    logged = in_csv(tmp_path)
    telemetry = {name for name in logged if name.startswith("telemetry/")}
    assert logged.keys() - telemetry == METRICS
    assert telemetry >= {"telemetry/images/compute_s", "telemetry/language/bridge_s"}
    assert [step for step, _ in logged["train/loss"]] == list(range(6))
    assert [value for _, value in logged["train/loss"]] == pytest.approx(first.losses)
    assert [step for step, _ in logged["val/loss"]] == [1, 3, 5]
    for values in (in_tensorboard(tmp_path), in_wandb(tmp_path)):
        assert {name: each for name, each in values.items() if name in METRICS}.keys() == METRICS
        for name, each in logged.items():
            assert values[name] == [(step, pytest.approx(value, rel=1e-5)) for step, value in each], name


# ---- options that say what is run, and when: against one process that was given the same

OPTIONS: dict[str, dict[str, Any]] = {
    "overfit_batches": {"overfit_batches": 2},
    "limits": {"limit_train_batches": 0.5, "limit_val_batches": 1, "max_epochs": 3},
    "val_check_interval": {"val_check_interval": 0.5},
    "check_val_every_n_epoch": {"check_val_every_n_epoch": 2, "val_check_interval": 3, "num_sanity_val_steps": -1},
    "steps_between_validations": {"check_val_every_n_epoch": None, "val_check_interval": 3, "max_epochs": 3},
    "fast_dev_run": {"fast_dev_run": 3},
    "barebones": {"barebones": True},
    "reload": {"reload_dataloaders_every_n_epochs": 1, "log_every_n_steps": 2},
    "two_validations": {"val_loaders": 2, "max_epochs": 1},
    "short_last_batch": {"samples": 29, "max_steps": 4},
    "scheduled_accumulation": {"accumulation": {0: 1, 1: 3}, "max_epochs": 3, "samples": 60, "max_steps": 8},
}


def fit_with_each(modules: Mapping[str, ModuleParallelism] | None) -> dict[str, list[tuple[str, float]]]:
    """Option -> what happened, under each of OPTIONS."""
    found = {}
    for name, given in OPTIONS.items():
        options = dict(given)
        schedule = options.pop("accumulation", None)
        trainer, events = fit(
            modules, callbacks=[GradientAccumulationScheduler(schedule)] if schedule else (), **options
        )
        found[name] = events.seen
        trainer.strategy.infra.destroy()
    return found


def test_options_run_what_they_run_in_one_process(rank_pool: RankPool) -> None:
    (expected,) = rank_pool.run(fit_with_each, None, world_size=1)
    for found in rank_pool.run(fit_with_each, PIPELINE, world_size=3):
        for name, events in expected.items():
            assert [what for what, _ in found[name]] == [what for what, _ in events], name
            assert [value for _, value in found[name]] == pytest.approx([value for _, value in events], rel=1e-4), name
    # What one process does is Lightning's; a few counts show that the options were taken.
    steps = {name: [what for what, _ in events if "step" in what] for name, events in expected.items()}
    validations = {name: sum("val/loss" in what for what, _ in events) for name, events in expected.items()}
    assert len(steps["overfit_batches"]) == 4 and len(steps["limits"]) == 6 and len(steps["fast_dev_run"]) == 3
    assert validations["val_check_interval"] == 4 and validations["check_val_every_n_epoch"] == 1
    assert steps["scheduled_accumulation"] == [f"step {i}" for i in (1, 2, 3, 4, 5, 5, 5, 6, 6, 7, 7, 7, 8)]
    assert not validations["barebones"] and len(steps["barebones"]) == 8


# ---- what users log themselves


class LogsInSteps(Module):
    """As in most LightningModules, and here on one rank only."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def _log(self, where: str) -> None:
        if where == self._where and dist.get_rank() == 2:
            self.log_dict({"mine": 1.0}, sync_dist=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._log("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self._log("validation_step")
        return super().validation_step(batch, batch_idx)

    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        self._log("loss")
        return super().loss(output, batch)


class LogsInHooks(Module):
    """A value for each rank, in hooks that all ranks come to."""

    def on_train_epoch_end(self) -> None:
        for reduced in ("mean", "sum", "max", "min"):
            value = torch.tensor(float(dist.get_rank() + 1))
            self.log(f"all/{reduced}", value, sync_dist=True, reduce_fx=reduced)
        self.log("own", float(dist.get_rank()))

    def on_validation_epoch_end(self) -> None:
        self.log("all/validation", float(dist.get_rank()), sync_dist=True)


def fit_and_log(where: str | None) -> dict[str, float]:
    trainer, _ = fit(PIPELINE, module=LogsInSteps(where) if where else LogsInHooks(), max_epochs=1, samples=24)
    trainer.strategy.infra.destroy()
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("where", ["training_step", "validation_step", "loss"])
def test_logging_in_a_step_is_refused_with_what_to_do(rank_pool: RankPool, where: str) -> None:
    message = (
        r"self\.log\('mine', \.\.\.\) inside of a step or of loss\(\).*Return it from loss\(\) as a metric, {'mine': \("
    )
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(fit_and_log, where, world_size=3)


def test_logging_in_hooks_is_reduced_over_all_ranks(rank_pool: RankPool) -> None:
    for rank, metrics in enumerate(rank_pool.run(fit_and_log, None, world_size=3)):
        logged = {name: value for name, value in metrics.items() if name.startswith(("all/", "own"))}
        assert logged == {
            "all/mean": 2.0,
            "all/sum": 6.0,
            "all/max": 3.0,
            "all/min": 1.0,
            "all/validation": 1.0,
            "own": float(rank),
        }


# ---- prediction


class Writer(BasePredictionWriter):
    """Keeps which samples each batch of answers is of."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.written: list[list[int]] = []

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        self.written.append([answer["sample_index"] for answer in prediction])


class CostlyPictures(PicturesAndText):
    """The same samples, in batches that are divided by their costs."""

    def cost(self, index: int) -> dict[str, float]:
        return {"images": index % 3, "language": 6 + index % 4}


def predict_and_write() -> tuple[list[list[int]], bool]:
    writer = Writer()
    trainer, _ = fit(PIPELINE, max_steps=1, callbacks=[writer])
    answers = {}
    for balance in (False, True):
        trainer.strategy.balance = balance
        writer.written = []
        answers[balance] = trainer.predict(trainer.lightning_module, DataLoader(CostlyPictures(20), batch_size=BATCH))
    trainer.strategy.infra.destroy()
    return writer.written, answers[True] == answers[False]


def test_prediction_writers_get_the_answers_to_all_samples(rank_pool: RankPool) -> None:
    for written, same_with_balance in rank_pool.run(predict_and_write, world_size=3):
        assert written == [list(range(12)), list(range(12, 20))]
        assert same_with_balance

"""What people write who know Lightning: it works as there, or is refused with what to write instead."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import DeviceStatsMonitor, LambdaCallback, SpikeDetection, ThroughputMonitor, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from megatron.core.optimizer import OptimizerConfig
from torch.utils.data import DataLoader, SequentialSampler

from lightning_mimo import MimoStrategy, ModuleParallelism
from tests.parity.layouts import PoolEnvironment
from tests.support.evaluation import PicturesAndText, TinyModule
from tests.support.rank_pool import RankFailure, RankPool

BATCH = 6
TWO = {"images": ModuleParallelism(), "language": ModuleParallelism()}


def loader(batches: int = 2) -> DataLoader:
    return DataLoader(PicturesAndText(BATCH * batches), batch_size=BATCH)


def trainer(*callbacks: pl.Callback, colocate: bool = True, strategy: dict[str, Any] | None = None, **options: Any):
    torch.manual_seed(1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(
        accelerator="cpu",
        strategy=MimoStrategy(TWO, BATCH, colocate=colocate, cluster_environment=PoolEnvironment(), **(strategy or {})),
        callbacks=list(callbacks),
        **{**quiet, "devices": dist.get_world_size(), "max_epochs": 1, "enable_checkpointing": False, **options},
    )


class TwoOptimizers(TinyModule):
    def configure_optimizers(self) -> Any:
        config = OptimizerConfig(optimizer="sgd", lr=0.1)
        return [self.build_optimizer(config), self.build_optimizer(config)]


class TorchsOptimizer(TinyModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NoOptimizer(TinyModule):
    def configure_optimizers(self) -> Any:
        return None


class ReturnsNothing(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class ReturnsLoss(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx).sum()}


class ReturnsScalar(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx).sum()


class ValidatesWithoutResult(TinyModule):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self(batch)


class ScalarLoss(TinyModule):
    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        return super().loss(output, batch)[0]


class NoLoss(TinyModule):
    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        return None


class MetricWithoutCount(TinyModule):
    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        total, tokens, _ = super().loss(output, batch)
        return total, tokens, {"accuracy": 0.5}


class BuildsParameterLate(TinyModule):
    def configure_model(self) -> None:
        super().configure_model()
        self.head = torch.nn.Linear(2, 2)


class Distributed(TinyModule):
    def configure_optimizers(self) -> Any:
        return self.build_optimizer(OptimizerConfig(optimizer="sgd", lr=0.1))


class KeepsInterval(pl.LightningDataModule):
    def __init__(self, interval: timedelta) -> None:
        super().__init__()
        self.save_hyperparameters()


class KeepsObjects(SequentialSampler):
    """Has a state that only its own code could read back."""

    def state_dict(self) -> dict[str, Any]:
        return {"since": timedelta(1)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def with_sampler() -> pl.Trainer:
    dataset = PicturesAndText(BATCH)
    return train(TinyModule(), data=DataLoader(dataset, batch_size=BATCH, sampler=KeepsObjects(dataset)))


class Freezes(pl.Callback):
    """Freezes the encoder in the second batch, or unfreezes it where it is frozen."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and "images" in pl_module.model.modality_submodules:
            for parameter in pl_module.model.modality_submodules["images"].parameters():
                parameter.requires_grad_(not parameter.requires_grad)


def train(module: pl.LightningModule, *callbacks: pl.Callback, data: Any = None, **options: Any) -> pl.Trainer:
    fitting = trainer(*callbacks, **options)
    fitting.fit(module, loader() if data is None else data, loader(1))
    return fitting


def distributed() -> None:
    from megatron.core.distributed import DistributedDataParallelConfig

    train(Distributed(), strategy={"ddp": DistributedDataParallelConfig(use_distributed_optimizer=True)})


def other_precision() -> None:
    module = TinyModule()
    train(module)
    trainer().test(module, loader(1), verbose=False)  # the same layout and precision
    trainer(precision="bf16-mixed").test(module, loader(1))


def unfreezes() -> None:
    module = TinyModule()
    module.frozen = ("images",)
    train(module, Freezes())


RETURNS = r"must return the output of the model, which goes to loss\(\)\. Write return self\(batch\)"
TUPLE = r"must return a tuple of three: the sum of the losses"
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "two_optimizers": (lambda: train(TwoOptimizers()), r"returned several optimizers, .*Return self\.build_optimizer"),
    "torch_optimizer": (lambda: train(TorchsOptimizer()), r"returned SGD, but MimoStrategy steps one optimizer"),
    "no_optimizer": (lambda: train(NoOptimizer()), r"configure_optimizers\(\) returned None"),
    "sgd_distributed": (distributed, r"'sgd'\) does not work with use_distributed_optimizer=True \(module 'images'\)"),
    "step_none": (lambda: train(ReturnsNothing()), rf"training_step\(\) returned None, but it {RETURNS}"),
    "step_dict": (lambda: train(ReturnsLoss()), rf"training_step\(\) returned a dict with 'loss', but it {RETURNS}"),
    "step_scalar": (lambda: train(ReturnsScalar()), rf"training_step\(\) returned a scalar, but it {RETURNS}"),
    "validation_none": (
        lambda: train(ValidatesWithoutResult()),
        rf"validation_step\(\) returned None, but it {RETURNS}",
    ),
    "loss_scalar": (lambda: train(ScalarLoss()), rf"loss\(\) returned a tensor of the shape \[\], but it {TUPLE}"),
    "loss_none": (lambda: train(NoLoss()), rf"loss\(\) returned None, but it {TUPLE}"),
    "metric": (lambda: train(MetricWithoutCount()), rf"\{{'accuracy': a float\}}\), but it {TUPLE}"),
    "two_loaders": (lambda: train(TinyModule(), data=[loader(), loader()]), r"a list of DataLoaders.*ConcatDataset"),
    "one_in_a_list": (lambda: train(TinyModule(), data=[loader()]), r"a list of DataLoaders, but MimoStrategy trains"),
    "dict_of_loaders": (lambda: train(TinyModule(), data={"a": loader()}), r"returned a dict of DataLoaders"),
    "combined_loader": (
        lambda: train(TinyModule(), data=CombinedLoader([loader(), loader()])),
        r"a list of DataLoaders, but MimoStrategy trains on one",
    ),
    "combined_evaluation": (
        lambda: trainer().test(TinyModule(), CombinedLoader([loader(), loader()], "max_size")),
        r"test_dataloader\(\) returned several DataLoaders at once.*give them as a list",
    ),
    "frozen_later": (
        lambda: train(TinyModule(), Freezes()),
        r"'images\.\S+' was frozen after .* would still be updated",
    ),
    "unfrozen_later": (
        unfreezes,
        r"'images\.\S+' was unfrozen after .* would not be updated\. Set requires_grad in con",
    ),
    "parameter": (
        lambda: train(BuildsParameterLate()),
        r"BuildsParameterLate\.head\.weight is a Parameter of the module",
    ),
    "precision": (other_precision, r"built by an earlier Trainer for another precision.*with ckpt_path="),
    "hyperparameters_of_data": (
        lambda: trainer().fit(TinyModule(), datamodule=KeepsInterval(timedelta(1))),
        r"KeepsInterval\.save_hyperparameters\(\) keeps 'interval', a timedelta",
    ),
    "sampler": (with_sampler, r"The state_dict\(\) of the sampler KeepsObjects holds more than numbers"),
    "second_trainer": (
        lambda: trainer(devices=2).fit(TinyModule(), loader()),
        r"has devices \* num_nodes = 2 ranks, but an earlier Trainer of this script has started 1",
    ),
    "remote": (lambda: train(TinyModule()).save_checkpoint("memory://a/b.ckpt"), r"in a remote store \(memory\)"),
}


def refuse() -> None:
    for name, (run, message) in REFUSED.items():
        with pytest.raises(ValueError, match=message):
            print(name)
            run()


def test_forms_that_cannot_be_are_refused_with_what_to_write(rank_pool: RankPool) -> None:
    rank_pool.run(refuse, world_size=1)


def train_apart(*callbacks: pl.Callback) -> None:
    train(TinyModule(), *callbacks, colocate=False)


def test_parameter_that_is_frozen_later_is_named_where_modules_are_apart(rank_pool: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"'images\.\S+' was frozen after the gradient buffers"):
        rank_pool.run(train_apart, Freezes(), world_size=2)


# ---- what works


class Saves(pl.Callback):
    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        time.sleep(0.3)
        trainer.save_checkpoint(self._path)


def work(folder: Path) -> None:
    _validate_on_no_and_several_loaders()
    _load_from_checkpoint(folder)
    _save_after_test(folder)
    _keep_own_buffers(folder)
    _end_with_the_timer(folder)


def _validate_on_no_and_several_loaders() -> None:
    fitting = trainer()
    fitting.fit(TinyModule(), loader(), [])
    assert fitting.global_step == 2
    evaluating, module = trainer(), TinyModule()
    figures = evaluating.test(module, [loader(1), loader(2)], verbose=False)
    assert [sorted(each) for each in figures] == [
        [f"test/{name}/dataloader_idx_{i}" for name in ("exact_match", "loss")] for i in (0, 1)
    ]
    answers = evaluating.predict(module, [loader(1), loader(2)])
    assert [[len(batch) for batch in each] for each in answers] == [[BATCH], [BATCH, BATCH]]


class Width(TinyModule):
    """Keeps an argument as a hyperparameter."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.max_new_tokens = tokens


def _load_from_checkpoint(folder: Path) -> None:
    fitting, module = trainer(), Width(3)
    fitting.fit(module, loader())
    fitting.save_checkpoint(folder / "width.ckpt")
    loaded = Width.load_from_checkpoint(folder / "width.ckpt")
    assert loaded.max_new_tokens == 3
    (expected,) = fitting.test(module, loader(1), verbose=False)
    (found,) = trainer().test(loaded, loader(1), verbose=False)
    assert found == expected


def _save_after_test(folder: Path) -> None:
    fitting, module = trainer(), TinyModule()
    fitting.fit(module, loader())
    fitting.test(module, loader(1), verbose=False)
    fitting.save_checkpoint(f"file://{folder}/whole.ckpt")
    fitting.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    resumed = trainer(max_epochs=2)
    resumed.fit(TinyModule(), loader(), ckpt_path=folder / "whole.ckpt")  # refused without the optimizer
    assert resumed.global_step == 4
    fitting.test(module, loader(1), ckpt_path=folder / "weights.ckpt", verbose=False)
    with pytest.raises(ValueError, match=r"an optimizer state that does not belong to its weights.*weights_only=True"):
        fitting.save_checkpoint(folder / "mixed.ckpt")


def _keep_own_buffers(folder: Path) -> None:
    def module(value: float) -> TinyModule:
        new = TinyModule()
        new.criterion = torch.nn.CrossEntropyLoss(weight=torch.full((3,), value))
        new.register_buffer("scale", torch.full((2,), value))
        new.register_buffer("passing", torch.full((2,), value), persistent=False)
        return new

    train(module(2.0)).save_checkpoint(folder / "buffers.ckpt")
    loaded = module(0.0)
    trainer().test(loaded, loader(1), ckpt_path=folder / "buffers.ckpt", verbose=False)
    assert loaded.criterion.weight.tolist() == [2.0] * 3 and loaded.scale.tolist() == [2.0] * 2
    assert loaded.passing.tolist() == [0.0] * 2
    with pytest.raises(
        ValueError, match=r"TinyModule has the buffers and constant parameters {} beside its model, but"
    ):
        trainer().test(TinyModule(), loader(1), ckpt_path=folder / "buffers.ckpt")


def _end_with_the_timer(folder: Path) -> None:
    limit = timedelta(seconds=0.2)
    fitting = trainer(Saves(folder / "timed.ckpt"), Timer(limit), max_epochs=9)
    fitting.fit(TinyModule(), loader())
    assert fitting.global_step == 1
    resumed = trainer(Timer(limit), max_epochs=9)
    resumed.fit(TinyModule(), loader(), ckpt_path=folder / "timed.ckpt")
    assert resumed.global_step == 1, "its time is over already"


def test_forms_of_lightning_work(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(work, tmp_path, world_size=1)


def test_monitors_get_what_they_look_at(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(monitor, tmp_path, world_size=1)


def monitor(folder: Path) -> None:
    """Callbacks of the page on Lightning that no other test runs."""
    started: list[int] = []
    logger = CSVLogger(folder)
    fitting = trainer(
        DeviceStatsMonitor(cpu_stats=True),
        ThroughputMonitor(batch_size_fn=lambda batch: BATCH),
        SpikeDetection(warmup=1),
        LambdaCallback(on_train_start=lambda *args: started.append(1)),
        logger=logger,
        log_every_n_steps=1,
        default_root_dir=folder,
    )
    fitting.fit(TinyModule(), loader(), loader(1))
    assert fitting.global_step == 2 and started == [1]
    logger.finalize("success")
    names = (Path(logger.log_dir) / "metrics.csv").read_text().partition("\n")[0]
    assert "DeviceStatsMonitor.on_train_batch_end/cpu_percent" in names and "train/loss" in names


# ---- several ranks


class OwnClock(pl.Callback):
    """Each rank sleeps for another time, and notes when it validates."""

    def __init__(self) -> None:
        self.validated: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        time.sleep(0.02 + 0.03 * dist.get_rank())

    def on_validation_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.validated.append(trainer.global_step)


class DrawsBuffer(TinyModule):
    def on_fit_start(self) -> None:
        self.register_buffer("mean", torch.full((2,), float(dist.get_rank())))


def train_with_own_clocks() -> list[int]:
    clock = OwnClock()
    fitting = trainer(clock, colocate=False, val_check_interval=timedelta(seconds=0.25))
    fitting.fit(TinyModule(), loader(12), loader(1))
    with pytest.raises(ValueError, match=r"DrawsBuffer\.mean differs between ranks.*persistent=False"):
        train(DrawsBuffer(), colocate=False)
    return clock.validated


def test_one_clock_decides_when_all_validate(rank_pool: RankPool) -> None:
    first, second = rank_pool.run(train_with_own_clocks, world_size=2)
    assert first == second
    assert len(first) >= 2

"""Every hook of Lightning runs under MimoStrategy, in the order and as often as on one device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_mimo import MimoStrategy, ModuleParallelism
from tests.parity.cases import apart, task, together
from tests.parity.layouts import Layout, PoolEnvironment, train, weights
from tests.parity.model import Model, ParityModule, PicturesSoundsAndText, Samples
from tests.parity.oracle import Tensors
from tests.support.evaluation import PicturesAndText, TinyModule
from tests.support.hooks import (
    CALLBACK_HOOKS,
    DATA_HOOKS,
    MODULE_HOOKS,
    STEPS,
    TRANSFER_HOOKS,
    Stateful,
    recording,
)
from tests.support.rank_pool import RankFailure, RankPool
from tests.support.tiers import exhaustive

BATCH, BATCHES, MICROBATCHES = 8, 5, 2  # of accumulation 3, the last window of an epoch has two batches only
LAYOUTS = {
    "apart": apart(ModuleParallelism(), ModuleParallelism(tp=2), num_microbatches=MICROBATCHES),
    "colocated": together(ModuleParallelism(dp=2), ModuleParallelism(tp=2), num_microbatches=MICROBATCHES),
}
Calls = dict[str, list[str]]
"""Stage -> hooks in the order in which they were called."""


class Plain(pl.LightningModule):
    """An ordinary LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).mean()

    validation_step = test_step = predict_step = training_step

    def configure_optimizers(self) -> Any:
        return scheduled(torch.optim.SGD(self.parameters(), lr=0.1))


class Mimo(TinyModule):
    """The same under MimoStrategy."""

    def configure_optimizers(self) -> Any:
        return scheduled(super().configure_optimizers())


def scheduled(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Data(pl.LightningDataModule):
    """The same samples for every stage."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__()
        self._dataset = dataset

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self._dataset, batch_size=BATCH)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def state_dict(self) -> dict[str, Any]:
        return {"kept": 1}


class Breaks(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            raise InterruptedError


def record(
    make_trainer: Callable[..., pl.Trainer],
    module: type[pl.LightningModule],
    dataset: Dataset,
    folder: Path,
    *,
    accumulate: int,
    transfers: str,
) -> Calls:
    """Run every stage of the Trainer, and what else has hooks: a checkpoint, going on from it, an exception."""
    calls: list[str] = []
    found: Calls = {}
    of_module, of_data = MODULE_HOOKS, DATA_HOOKS
    if transfers == "module":
        of_module += TRANSFER_HOOKS
    else:
        of_data += TRANSFER_HOOKS
    fresh_module = recording(module, of_module, label="module", calls=calls)
    fresh_data = partial(recording(Data, of_data, label="data", calls=calls), dataset)
    watch = recording(Stateful, CALLBACK_HOOKS, label="callback", calls=calls)

    def trainer(epochs: int, *more: pl.Callback) -> pl.Trainer:
        save = ModelCheckpoint(folder / f"{epochs}", every_n_train_steps=2, save_top_k=-1)
        return make_trainer(
            callbacks=[watch(), *more, save],
            max_epochs=epochs,
            accumulate_grad_batches=accumulate,
            val_check_interval=2,
            limit_val_batches=2,
            num_sanity_val_steps=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def done(stage: str) -> None:
        found[stage] = calls.copy()
        calls.clear()

    first, module, data = trainer(2), fresh_module(), fresh_data()
    first.fit(module, data)
    done("fit")
    first.save_checkpoint(folder / "end.ckpt")
    done("save")
    for stage in ("validate", "test", "predict"):
        getattr(first, stage)(module, data)
        done(stage)
    close(first)
    second = trainer(3)
    second.fit(fresh_module(), fresh_data(), ckpt_path=folder / "end.ckpt", weights_only=True)
    done("resume")
    close(second)
    third = trainer(4, Breaks())
    with pytest.raises(InterruptedError):
        third.fit(fresh_module(), fresh_data())
    done("break")
    close(third)
    return found


def close(trainer: pl.Trainer) -> None:
    if isinstance(trainer.strategy, MimoStrategy):
        trainer.strategy.infra.destroy()


def record_on_one_device(folder: Path, **options: Any) -> Calls:
    dataset = list(torch.ones(BATCH * BATCHES, 2))
    return record(partial(pl.Trainer, accelerator="cpu", devices=1), Plain, dataset, folder, **options)


def record_under_mimo(layout: Layout, folder: Path, **options: Any) -> Calls:
    def make_trainer(**arguments: Any) -> pl.Trainer:
        strategy = MimoStrategy(
            dict(layout.modules),
            BATCH,
            layout.num_microbatches,
            colocate=layout.colocate,
            cluster_environment=PoolEnvironment(),
        )
        return pl.Trainer(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, **arguments)

    torch.manual_seed(1)
    return record(make_trainer, Mimo, PicturesAndText(BATCH * BATCHES), folder, **options)


# ---- what differs, and why

PREPARES = ("module.prepare_data", "data.prepare_data")
"""Called on the first rank of a node only, as under every strategy of Lightning's with several processes."""
STEPS_OF_MODULE = tuple(f"module.{name}" for name in STEPS)
"""Called for every microbatch, and predict_step for every token of the answer, too."""
RESTORES = (
    "data.load_state_dict",
    "callback.on_load_checkpoint",
    "module.on_load_checkpoint",
    "callback.load_state_dict",
)
"""Called after on_fit_start, as under Lightning's own strategies that shard: only then is there what is loaded into."""


def once(calls: list[str]) -> list[str]:
    """With a step for every microbatch taken for one."""
    return [name for name, same in groupby(calls) for _ in (range(1) if name in STEPS_OF_MODULE else same)]


def without(names: tuple[str, ...], calls: list[str]) -> list[str]:
    return [name for name in calls if name not in names]


@pytest.mark.parametrize(("accumulate", "transfers"), [exhaustive(1, "data"), (3, "module")])
def test_hooks_are_those_of_one_device(rank_pool: RankPool, tmp_path: Path, accumulate: int, transfers: str) -> None:
    options = {"accumulate": accumulate, "transfers": transfers}
    (expected,) = rank_pool.run(record_on_one_device, tmp_path / "one", **options, world_size=1)
    assert {"callback.on_before_backward", "callback.on_after_backward", "module.backward"} <= set(expected["fit"])
    for name, layout in LAYOUTS.items():
        ranks = rank_pool.run(record_under_mimo, layout, tmp_path / name, **options, world_size=layout.ranks)
        for rank, found in enumerate(ranks):
            assert found.keys() == expected.keys()
            for stage, calls in expected.items():
                on_this_rank = calls if rank == 0 else without(PREPARES, calls)
                assert without(RESTORES, once(found[stage])) == without(RESTORES, on_this_rank), (name, rank, stage)
                assert sorted(once(found[stage])) == sorted(on_this_rank), (name, rank, stage)
            steps = Counter(found["fit"])
            assert steps["module.training_step"] == MICROBATCHES * 2 * BATCHES
            assert steps["module.validation_step"] == MICROBATCHES * (2 * 2 * 2 + 1)


def test_every_hook_is_among_those_that_are_compared(rank_pool: RankPool, tmp_path: Path) -> None:
    """One that no stage calls would be equal in vain."""
    called: set[str] = set()
    for transfers in ("module", "data"):
        (found,) = rank_pool.run(record_on_one_device, tmp_path, accumulate=1, transfers=transfers, world_size=1)
        called |= {name for calls in found.values() for name in calls}
    hooks = {f"callback.{name}" for name in CALLBACK_HOOKS}
    hooks |= {f"module.{name}" for name in (*MODULE_HOOKS, *TRANSFER_HOOKS)}
    hooks |= {f"data.{name}" for name in (*DATA_HOOKS, *TRANSFER_HOOKS)}
    assert hooks - called == set()


# ---- a hook that decides whether the weights are updated


class LeavesOutSteps(ParityModule):
    """Updates the weights with every second batch only."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        if batch_idx % 2:
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)


class ForgetsTheClosure(ParityModule):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.step()


def train_on(kind: type[ParityModule], layout: Layout, batches: list[int]) -> Tensors:
    """Final weights after a batch of each number."""
    indices = [batch * BATCH + i for batch in batches for i in range(BATCH)]
    dataset = Subset(PicturesSoundsAndText(Samples(number=4 * BATCH)), indices)
    what = task(steps=len(batches), batch=BATCH, precision="32-true")
    _, module, strategy = train(what, layout, module=kind(Model()), dataset=dataset)
    final = weights(module.model, strategy.infra)
    strategy.infra.destroy()
    return final


@pytest.mark.parametrize("ddp", [{}, {"use_distributed_optimizer": True}], ids=["", "distributed_optimizer"])
def test_batch_whose_step_is_left_out_changes_nothing(rank_pool: RankPool, ddp: dict[str, Any]) -> None:
    layout = apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2), ddp=ddp)
    expected = rank_pool.run(train_on, ParityModule, layout, [0, 2], world_size=4)
    found = rank_pool.run(train_on, LeavesOutSteps, layout, [0, 1, 2, 3], world_size=4)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_step_without_its_closure_says_what_to_write(rank_pool: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"finds no gradients.* Write optimizer\.step\(closure=optimizer_closure\)"):
        rank_pool.run(train_on, ForgetsTheClosure, LAYOUTS["apart"], [0], world_size=3)

"""Communicators are made before the first batch: exactly those that the run uses, in an order that cannot deadlock."""

from __future__ import annotations

from collections import defaultdict
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_mimo import MimoPrecision, MimoStrategy
from lightning_mimo import ModuleParallelism as Cut
from lightning_mimo.layout.communicators import SENT, Communicator
from lightning_mimo.mimo.communicators import communicators_of
from lightning_mimo.parallel.communicators import make_communicators
from lightning_mimo.strategy import world
from tests.parity.cases import apart, task, together
from tests.parity.layouts import Layout, PoolEnvironment, train
from tests.parity.model import ParityModule, PicturesSoundsAndText
from tests.parity.oracle import Task
from tests.support.rank_pool import RankPool

Used = set[tuple[str, tuple[int, ...]]]
"""Name of a process group, and the ranks of the communicator that it has for an operation."""


class RecordsGroups(TorchDispatchMode):
    """Notes the communicators that NCCL would make for the operations that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.used: Used = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "c10d":
            boxed = next(each for each in tree_leaves(args) if isinstance(each, torch.ScriptObject))
            group = dist.ProcessGroup.unbox(boxed)
            ranks = dist.get_process_group_ranks(group)
            if func._overloadpacket.__name__ in ("send", "recv_"):
                ranks = sorted((dist.get_rank(), ranks[args[2]]))
            if len(ranks) > 1:
                self.used.add((group.group_name, tuple(ranks)))
        return func(*args, **(kwargs or {}))


class Compare(pl.Callback):
    """Records what making the communicators uses, and what the run does, building the model included."""

    def __init__(self) -> None:
        self.needed: list[Communicator] = []
        self.made: Used = set()
        self.run, self.build = RecordsGroups(), RecordsGroups()
        self.listed: dict[tuple[str, tuple[int, ...]], Communicator] = {}

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self.build.__enter__()  # the model is built between the hooks

    def begin(self, trainer: pl.Trainer, pl_module: Any, *, training: bool = False) -> None:
        self.build.__exit__(None, None, None)
        infra = trainer.strategy.infra
        self.needed = list(communicators_of(pl_module.model, infra, training=training))
        self.listed = {(infra.group_of(each).group_name, each.ranks): each for each in self.needed}
        with RecordsGroups() as recorded:
            make_communicators(infra, self.needed)
        self.made = recorded.used
        self.run.__enter__()  # in training before the replicas are compared

    def end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.run.__exit__(None, None, None)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.begin(trainer, pl_module, training=True)

    on_validation_start = on_test_start = on_predict_start = begin
    on_train_end = on_validation_end = on_test_end = on_predict_end = end

    def differences(self) -> dict[str, list[str]]:
        """Communicators that are not in all three: those that are listed, made and used."""
        used = self.build.used | self.run.used
        found = defaultdict(list)
        names = {key: f"{each.use} {each.module} {each.ranks}" for key, each in self.listed.items()}
        for what, keys in {
            "listed, but not made": set(self.listed) - self.made,
            "made, but not used": self.made - used,
            "used, but not made": used - self.made,
        }.items():
            for key in sorted(keys):
                found[what].append(names.get(key, f"{dist.distributed_c10d._world.pg_names} {key}"))
        assert self.needed == sorted(self.needed)
        return dict(found)


def differences(chosen: Task, layout: Layout) -> dict[str, list[str]]:
    compare = Compare()
    _, _, strategy = train(chosen, layout, callbacks=(compare,))
    assert not strategy.infra.colocated or not {each.use for each in compare.needed} & set(SENT)
    strategy.infra.destroy()
    return compare.differences()


def differences_of_evaluation(chosen: Task, layout: Layout, entry_point: str) -> dict[str, list[str]]:
    """What an entry point of the Trainer alone does. With gloo the strategy makes nothing: it is told of NCCL here."""
    compare = Compare()
    strategy = MimoStrategy(
        dict(layout.modules),
        chosen.batch,
        layout.num_microbatches,
        colocate=layout.colocate,
        precision_plugin=MimoPrecision(chosen.precision),
        cluster_environment=PoolEnvironment(),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        callbacks=[compare],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        limit_test_batches=1,
        limit_predict_batches=1,
    )
    module = ParityModule(chosen.model, sequence_parallel=layout.sequence_parallel)
    loader = DataLoader(_Prompts(chosen.samples), batch_size=chosen.batch)
    made: list[list[Communicator]] = []
    with (
        mock.patch.object(world, "make_communicators", lambda infra, needed: made.append(list(needed))),
        mock.patch.object(world, "dist", _SaysNccl()),
    ):
        getattr(trainer, entry_point)(module, loader)
    strategy.infra.destroy()
    assert made == [compare.needed], "the strategy makes them once, before the first batch"
    return compare.differences()


class _Prompts(PicturesSoundsAndText):
    """The same samples, of which only the last token is to be answered."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        sample["loss_mask"][:-1] = 0
        return sample


class _SaysNccl:
    """torch.distributed, whose groups are called NCCL's."""

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: "nccl") if name == "get_backend" else getattr(dist, name)


OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
CASES = {
    "pipeline": (task(), apart(Cut(dp=2), Cut(tp=2, pp=2), num_microbatches=3)),
    "tied": (task(tied=True, precision="bf16-mixed"), apart(Cut(), Cut(pp=2, dp=2), ddp=OVERLAP)),
    "colocated": (task(), together(Cut(dp=4), Cut(tp=2, dp=2), num_microbatches=3)),
    "experts": (task(experts=4, precision="32-true"), apart(Cut(), Cut(tp=2, dp=2, ep=2), sequence_parallel=True)),
    "frozen": (task(frozen=("images",)), apart(Cut(dp=2), Cut(pp=2, dp=2))),
    "tied_and_frozen": (task(tied=True, frozen=("language",)), apart(Cut(), Cut(pp=2))),
}


@pytest.mark.parametrize(
    "name", ["tied", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in CASES if name != "tied")]
)
def test_made_are_those_that_training_uses(rank_pool: RankPool, name: str) -> None:
    chosen, layout = CASES[name]
    for found in rank_pool.run(differences, chosen, layout, world_size=layout.ranks):
        assert found == {}


EVALUATED = {
    "apart": (task(), apart(Cut(), Cut(tp=2))),
    "fan-in": (task(), together(Cut(dp=2), Cut(tp=2))),
    **{name: CASES[name] for name in ("pipeline", "colocated", "experts", "tied")},
}


@pytest.mark.parametrize("entry_point", ["validate", "test", "predict"])
@pytest.mark.parametrize(
    "name", ["apart", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in EVALUATED if name != "apart")]
)
def test_made_are_those_that_evaluation_alone_uses(rank_pool: RankPool, name: str, entry_point: str) -> None:
    chosen, layout = EVALUATED[name]
    found = rank_pool.run(differences_of_evaluation, chosen, layout, entry_point, world_size=layout.ranks)
    assert found == [{}] * layout.ranks

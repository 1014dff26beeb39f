"""Communicators are made before the first step: exactly those that training uses, in an order that cannot deadlock."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_mimo import ModuleParallelism as Cut
from lightning_mimo.layout.communicators import SENT, Communicator
from lightning_mimo.mimo.communicators import communicators_of
from lightning_mimo.parallel.communicators import make_communicators
from tests.parity.cases import apart, task, together
from tests.parity.layouts import Layout, train
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
    """Records what making the communicators uses, and what training uses."""

    def __init__(self) -> None:
        self.needed: list[Communicator] = []
        self.made: Used = set()
        self.trained = RecordsGroups()
        self.listed: dict[tuple[str, tuple[int, ...]], Communicator] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        infra = trainer.strategy.infra
        self.needed = list(communicators_of(pl_module.model, infra))
        self.listed = {(infra.group_of(each).group_name, each.ranks): each for each in self.needed}
        with RecordsGroups() as recorded:
            make_communicators(infra, self.needed)
        self.made = recorded.used
        self.trained.__enter__()  # before the replicas are compared

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.trained.__exit__(None, None, None)


def differences(chosen: Task, layout: Layout) -> dict[str, list[str]]:
    compare = Compare()
    _, _, strategy = train(chosen, layout, callbacks=(compare,))
    listed, made, trained = set(compare.listed), compare.made, compare.trained.used
    found = defaultdict(list)
    names = {key: f"{each.use} {each.module} {each.ranks}" for key, each in compare.listed.items()}
    for what, keys in {
        "listed, but not made": listed - made,
        "made, but not used": made - trained,
        "used, but not made": trained - made,
    }.items():
        for key in sorted(keys):
            found[what].append(names.get(key, f"{dist.distributed_c10d._world.pg_names} {key}"))
    assert compare.needed == sorted(compare.needed)
    assert not strategy.infra.colocated or not {each.use for each in compare.needed} & set(SENT)
    strategy.infra.destroy()
    return dict(found)


OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
CASES = {
    "pipeline": (task(), apart(Cut(dp=2), Cut(tp=2, pp=2), num_microbatches=3)),
    "tied": (task(tied=True, precision="bf16-mixed"), apart(Cut(), Cut(pp=2, dp=2), ddp=OVERLAP)),
    "colocated": (task(), together(Cut(dp=4), Cut(tp=2, dp=2), num_microbatches=3)),
    "experts": (task(experts=4, precision="32-true"), apart(Cut(), Cut(tp=2, dp=2, ep=2), sequence_parallel=True)),
    "frozen": (task(frozen=("images",)), apart(Cut(dp=2), Cut(pp=2, dp=2))),
}


@pytest.mark.parametrize(
    "name", ["tied", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in CASES if name != "tied")]
)
def test_made_are_those_that_training_uses(rank_pool: RankPool, name: str) -> None:
    chosen, layout = CASES[name]
    for found in rank_pool.run(differences, chosen, layout, world_size=layout.ranks):
        assert found == {}

"""What a step costs beside computing: collectives over all ranks, and reads of the device by the host."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from megatron.core.models.mimo.optimizer import get_mimo_optimizer
from megatron.core.optimizer import OptimizerConfig
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mimo import ModuleParallelism
from lightning_mimo.mimo.model import build_mimo_model
from lightning_mimo.optim.ddp import options_by_module, wrap_with_ddp
from tests.parity.cases import apart, task, together
from tests.parity.layouts import Layout, open_world, train
from tests.parity.model import Model, ParityModule, Samples
from tests.parity.oracle import Task
from tests.support.rank_pool import RankPool

LAYOUTS = {
    "images_dp2-language_tp2": apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
    "images_dp2-language_tp2pp2": apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2, pp=2)),
    "colocated-images_dp2-language_tp2": together(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
}


# On a GPU the host waits for their results, or for the size of them.
_WAITED_FOR = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.unique_dim.default,
)


class WorldCollectives(TorchDispatchMode):
    """Counts the collectives of the default process group, and where scalars are read to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        if func.namespace == "c10d" and _is_world(args[names.index("process_group")]):
            self.collectives[f"{func._opname} {caller()}"] += 1
        if func in _WAITED_FOR:
            self.reads[caller()] += 1
        return func(*args, **(kwargs or {}))


class ListReads(TorchFunctionMode):
    """Counts reads of whole tensors, which are no operation of the dispatcher on a CPU."""

    def __init__(self, reads: Counter[str]) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            self._reads[caller()] += 1
        return func(*args, **(kwargs or {}))


def _is_world(argument: Any) -> bool:
    return dist.ProcessGroup.unbox(argument).group_name == dist.group.WORLD.group_name


def caller() -> str:
    """The innermost file of this package, megatron-core or Lightning that is being run; or that data are loaded."""
    ours = ("lightning_mimo", "megatron", "lightning", "tests")
    frames = [frame for frame in traceback.extract_stack()[:-1] if not frame.name.startswith("__torch_")]
    files = [Path(frame.filename) for frame in frames]
    if any(file.stem == "prefetch" for file in files):
        return LOADER
    file = next(file for file in reversed(files) if any(part in ours for part in file.parts))
    return f"{file.parent.name}/{file.stem}"


def count(run: Callable[[], Any]) -> tuple[Counter[str], Counter[str]]:
    """World collectives and host reads of a call."""
    with WorldCollectives() as mode, ListReads(mode.reads):
        run()
    return mode.collectives, mode.reads


class CountStep(pl.Callback):
    """Counts over the second batch, Lightning's part included; reads only once it has been loaded."""

    def __init__(self) -> None:
        self.collectives: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self._mode = WorldCollectives()
        self._open = ExitStack()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 1:
            self._mode.reads.clear()
            self._open.enter_context(ListReads(self._mode.reads))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._open.close()
        if batch_idx == 0:
            self._open.enter_context(self._mode)
        if batch_idx == 1:
            self.collectives, self.reads = self._mode.collectives, self._mode.reads


def count_step(task: Task, layout: Layout) -> tuple[Counter[str], Counter[str]]:
    counts = CountStep()
    *_, strategy = train(task, layout, callbacks=[counts], log_every_n_steps=1)
    strategy.infra.destroy()
    return counts.collectives, counts.reads


# What both read is on the host anyway.
GENERATOR, LOADER = "tensor_parallel/random", "the next batch, loaded ahead"


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("images_dp2-language_tp2pp2", "32-true"),
        ("colocated-images_dp2-language_tp2", "bf16-mixed"),
        ("images_dp2-language_tp2", "16-mixed"),
    ],
)
def test_step_has_one_collective_over_all_ranks_and_one_read(rank_pool: RankPool, name: str, precision: str) -> None:
    layout = LAYOUTS[name]
    for collectives, reads in rank_pool.run(count_step, task(precision=precision), layout, world_size=layout.ranks):
        assert collectives == {"allreduce_ schedule/forward_backward": 1}
        del reads[GENERATOR], reads[LOADER]
        assert reads == {"optim/step_reduction": 1}


def test_accumulated_batches_read_nothing(rank_pool: RankPool) -> None:
    accumulating = task(accumulate=3, samples=Samples(number=48))
    for collectives, reads in rank_pool.run(count_step, accumulating, LAYOUTS["images_dp2-language_tp2"], world_size=4):
        assert collectives == {"allreduce_ schedule/forward_backward": 1}, "the loss"
        assert reads.keys() <= {GENERATOR, LOADER}


def count_upstream(layout: Layout) -> tuple[Counter[str], Counter[str]]:
    """The same with megatron-core's MimoOptimizer, and tokens and loss told to the ranks as Megatron-Bridge does it."""
    with open_world(layout) as infra:
        model = build_mimo_model(ParityModule(Model()).configure_mimo(infra), infra, seed=1)
        wrap_with_ddp(model, infra, options_by_module(None, infra.layout.modules))
        optimizer = get_mimo_optimizer(model, OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0))

        def step() -> None:
            last = dist.get_world_size() - 1
            tokens, loss = torch.ones(()), torch.ones(())
            dist.broadcast(tokens, src=last)
            updated, *_ = optimizer.step()
            assert updated
            dist.all_reduce(loss)
            dist.broadcast_object_list([float(loss)], src=last)

        return count(step)


def test_upstream_has_seven_collectives_over_all_ranks_and_more_reads(rank_pool: RankPool) -> None:
    for collectives, reads in rank_pool.run(count_upstream, LAYOUTS["images_dp2-language_tp2"], world_size=4):
        # Overflow, norm and success in the optimizer, the tokens, and the loss twice, of which an object counts double.
        assert collectives == {
            "allreduce_ mimo/optimizer": 3,
            "allreduce_ strategy/test_control_plane": 1,
            "broadcast_ strategy/test_control_plane": 3,
        }
        # The optimizer reads each of its three, and the norm of each module before.
        assert (reads["mimo/optimizer"], reads["optimizer/clip_grads"]) == (3, 1)

"""What an estimate says of memory is what real ranks hold: storages of living tensors, counted at their peak."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_mimo import ModuleParallelism
from lightning_mimo.comm.p2p import ReceiveChannel
from lightning_mimo.models.sizes import Recompute
from lightning_mimo.observe.spans import LOADING
from lightning_mimo.planning.memory_ledger import MemoryLedger
from tests.parity.layouts import PoolEnvironment
from tests.support.estimates import EqualSamples, EstimatedModule, estimate, ranks_of, strategy_of, trainer_of
from tests.support.rank_pool import RankPool

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*core_attn is from transformer_engine"),
    pytest.mark.filterwarnings("ignore:.*there is no optimizer on RANK"),
]

LIMIT = 0.03
_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout, and arguments of the model and the strategy."""

    modules: dict[str, ModuleParallelism]
    colocate: bool = False
    run: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


def cut(**sizes: int) -> ModuleParallelism:
    return ModuleParallelism(**{"dp": 1, **sizes})


DISTRIBUTED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
CASES = {
    "apart-1f1b-run_ahead_2": Case(
        modules={"images": cut(), "language": cut(pp=2)}, run={"encoder_run_ahead": 2, "precision": "bf16-mixed"}
    ),
    "colocated-distributed-bf16": Case(
        modules={"images": cut(dp=2), "language": cut(tp=2)},
        colocate=True,
        run={"ddp": DISTRIBUTED, "precision": "bf16-mixed"},
        model={"sequence_parallel": True},
    ),
    "apart-dp2": Case(modules={"images": cut(dp=2), "language": cut(dp=2)}),
    "apart-no_run_ahead": Case(modules={"images": cut(), "language": cut(pp=2)}, run={"encoder_run_ahead": 0}),
    "apart-tp2": Case(modules={"images": cut(tp=2), "language": cut(tp=2)}),
    "apart-tp2-sequence_parallel": Case(
        modules={"images": cut(dp=2), "language": cut(tp=2)}, model={"sequence_parallel": True}
    ),
    "apart-pp4-recompute": Case(modules={"images": cut(), "language": cut(pp=4)}, model={"recompute": Recompute()}),
    "apart-selective": Case(
        modules={"images": cut(), "language": cut(tp=2)}, model={"recompute": Recompute(granularity="selective")}
    ),
    "encoder_pp2": Case(modules={"images": cut(pp=2), "language": cut()}),
    "experts-several_on_a_rank": Case(
        modules={"images": cut(), "language": cut(tp=2, ep=2)}, model={"experts": 4, "sequence_parallel": True}
    ),
    "experts-ep2": Case(modules={"images": cut(), "language": cut(dp=2, ep=2)}, model={"experts": 2}),
    "frozen_encoder": Case(modules={"images": cut(), "language": cut(pp=2)}, model={"frozen": ("images.encoders",)}),
    "frozen_all_but_projector": Case(
        modules={"images": cut(), "language": cut()}, model={"frozen": ("images.encoders", "language")}
    ),
    "distributed-bf16-mixed": Case(
        modules={"images": cut(dp=2), "language": cut(dp=2, pp=2)}, run={"ddp": DISTRIBUTED, "precision": "bf16-mixed"}
    ),
    "bf16-true": Case(modules={"images": cut(), "language": cut()}, run={"precision": "bf16-true"}),
    "two_encoders": Case(modules={"images": cut(), "audio": cut(), "language": cut(pp=2)}),
    "apart-pp2-32_microbatches": Case(
        modules={"images": cut(), "language": cut(pp=2)}, run={"num_microbatches": 32, "encoder_run_ahead": 0}
    ),
    "colocated-one_rank": Case(modules={"images": cut(), "language": cut()}, colocate=True),
}
BY_DEFAULT = ("apart-1f1b-run_ahead_2",)


class Census(TorchDispatchMode):
    """Counts the storages of living tensors, except those of batches that are being loaded."""

    def __init__(self, spans: Any) -> None:
        super().__init__()
        self.ledger = MemoryLedger()
        self._spans = spans

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        span = self._spans.current()
        if span is None or span.info.kind != LOADING:
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.ledger.add(tensor, "peak")
        return out


class CountMemory(pl.Callback):
    """Counts from the start of training, and keeps the peak of the last step."""

    peak = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._census = Census(trainer.strategy.spans)
        kept = [*pl_module.parameters(), *pl_module.buffers()]
        for module in pl_module.modules():
            for buffer in (*getattr(module, "buffers_of_gradients", ()), *_gradient_buffers(module)):
                kept.append(buffer)
        for group in (g for _, inner in trainer.optimizers[0].mimo._inner() for g in inner.optimizer.param_groups):
            kept += group["params"]
        self._census.ledger.assign(kept, "kept")
        self._census.__enter__()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._census.ledger.assign(
            (each for each in torch.utils._pytree.tree_leaves(list(batch)) if _is_tensor(each)), "batch"
        )
        if batch_idx == _STEPS - 1:
            self._census.ledger.begin()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == _STEPS:
            self._census.__exit__(None, None, None)
            self.peak = sum(self._census.ledger.peaks["peak"].values())


_expect = ReceiveChannel.expect


def _expect_as_with_gloo(channel: ReceiveChannel, shapes: Any) -> None:
    """Post the next receive while the rank computes, as real ranks on CPUs do and those on GPUs do not."""
    channel._ahead = 1
    _expect(channel, shapes)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _gradient_buffers(module: Any) -> list[torch.Tensor]:
    found = [*getattr(module, "expert_parallel_buffers", ()), *(module.buffers if _is_ddp(module) else ())]
    return [tensor for buffer in found for tensor in (buffer.grad_data, buffer.param_data) if tensor is not None]


def _is_ddp(module: Any) -> bool:
    return hasattr(module, "expert_parallel_buffers")


def measure(case: Case) -> int:
    """Bytes of living tensors at the peak of the second step, on this rank."""
    audio = "audio" in case.modules
    strategy = strategy_of(case.modules, colocate=case.colocate, cluster_environment=PoolEnvironment(), **case.run)
    counting = CountMemory()
    ranks = ranks_of(case.modules, colocate=case.colocate)
    trainer = trainer_of(strategy, ranks=ranks, max_steps=_STEPS, callbacks=[counting])
    loader = DataLoader(EqualSamples(audio=audio), batch_size=strategy.global_batch_size)
    trainer.fit(EstimatedModule(audio=audio, **case.model), loader)
    strategy.infra.destroy()
    return counting.peak


@pytest.mark.parametrize(
    "name", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.exhaustive) for name in CASES]
)
def test_estimate_is_what_real_ranks_hold(rank_pool: RankPool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    found = rank_pool.run(measure, case, world_size=ranks_of(case.modules, colocate=case.colocate))
    monkeypatch.setattr(ReceiveChannel, "expect", _expect_as_with_gloo)
    for kind in estimate(case.modules, colocate=case.colocate, **case.run, **case.model):
        measured = found[kind.ranks[0]]
        line = f"{name} {dict(kind.stages)}: {kind.memory.tensors} estimated, {measured} measured, at {kind.peak_at}"
        print(f"{line}, {kind.memory.tensors / measured - 1:+.2%}; {kind.memory}")
        assert kind.memory.tensors == pytest.approx(measured, rel=LIMIT), line

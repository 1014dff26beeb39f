"""Replicas that begin with other weights than their fellows: refused before the first step, by name."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from lightning_mimo import ModuleParallelism as Cut
from lightning_mimo.mimo.parameter_names import named_parameters_of
from lightning_mimo.mimo.replica_check import checksum
from tests.parity.cases import apart, task, together
from tests.parity.layouts import Layout, train
from tests.parity.oracle import Task
from tests.support.rank_pool import RankFailure, RankPool
from tests.support.tiers import exhaustive

PROJECTOR = "images.input_projections.0.encoder.linear_fc1.weight"
NORM = "language.decoder.final_layernorm.weight"
EXPERT = "language.decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight"
OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


class ChangesWeight(pl.Callback):
    """Adds a little to the last number of a parameter on one rank."""

    def __init__(self, rank: int, name: str) -> None:
        self.rank, self.name = rank, name

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if dist.get_rank() == self.rank:
            module = self.name.partition(".")[0]
            found = dict(named_parameters_of(pl_module.model, trainer.strategy.infra, module))
            found[self.name].data.view(-1)[-1] += 1e-3


def losses(chosen: Task, layout: Layout, *callbacks: pl.Callback) -> list[float]:
    recorder, _, strategy = train(chosen, layout, callbacks=callbacks)
    strategy.infra.destroy()
    return recorder.losses


@pytest.mark.parametrize(
    ("chosen", "layout", "rank", "name", "ranks"),
    [
        (task(), apart(Cut(dp=2), Cut(dp=2)), 1, PROJECTOR, r"ranks \[0\] hold \w+; ranks \[1\] hold \w+"),
        (task(), apart(Cut(dp=2), Cut(tp=2)), 3, NORM, r"ranks \[2\] hold \w+; ranks \[3\] hold \w+"),
        (
            task(),
            together(Cut(tp=2, dp=2), Cut(dp=4), num_microbatches=3),
            3,
            PROJECTOR,
            r"ranks \[1\] hold \w+; ranks \[3\] hold \w+",
        ),
        (
            task(experts=4, precision="32-true"),
            apart(Cut(), Cut(dp=4, ep=2), num_microbatches=3),
            4,
            EXPERT,
            r"ranks \[2\] hold \w+; ranks \[4\] hold \w+",
        ),
    ],
    ids=["data_parallel", "whole_on_tensor_parallel_ranks", "shards", "experts"],
)
def test_other_weight_on_one_rank_is_named(
    chosen: Task, layout: Layout, rank: int, name: str, ranks: str, rank_pool: RankPool
) -> None:
    module = name.partition(".")[0]
    message = rf"ReplicaError: Module '{module}': the ranks that hold copies of '{name}' hold .*: ({ranks})"
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(losses, chosen, layout, ChangesWeight(rank, name), world_size=layout.ranks)


@pytest.mark.parametrize(
    ("chosen", "layout"),
    [
        exhaustive(task(tied=True), apart(Cut(dp=2), Cut(tp=2, pp=2))),
        (task(precision="bf16-mixed"), apart(Cut(pp=2), Cut(dp=2), ddp=OVERLAPPED)),
        exhaustive(
            task(experts=4, precision="32-true"), apart(Cut(dp=2), Cut(tp=2, dp=2, ep=2), sequence_parallel=True)
        ),
    ],
    ids=["tied-pipelined", "overlapped", "experts"],
)
def test_equal_weights_train(chosen: Task, layout: Layout, rank_pool: RankPool) -> None:
    assert all(len(found) == chosen.steps for found in rank_pool.run(losses, chosen, layout, world_size=layout.ranks))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_checksum_sees_every_bit_and_every_place(dtype: torch.dtype) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    other, swapped = values.clone(), values.clone()
    other[-1] = -other[-1]
    swapped[[3, 900]] = values[[900, 3]]
    sums = {int(checksum(each)) for each in (values, other, swapped)}
    assert len(sums) == 3
    assert int(checksum(values.clone())) in sums
    assert all(0 <= each < 2**62 for each in sums)


def test_checksum_of_a_tensor_that_is_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mimo.mimo.replica_check._CHUNK", 7)
    values = torch.arange(100.0)
    swapped = values.clone()
    swapped[[3, 90]] = values[[90, 3]]
    assert checksum(values) != checksum(swapped)
    assert checksum(values) == checksum(values.view(10, 10))

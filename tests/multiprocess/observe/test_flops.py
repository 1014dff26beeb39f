"""Operations of each module: those that torch counts, in any layout, in batches of other shapes, too."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.flop_counter import FlopCounterMode

from lightning_mimo import ModuleParallelism as Cut
from lightning_mimo.models.sizes import Recompute
from tests.parity.cases import apart, task, together
from tests.parity.layouts import Layout, train
from tests.parity.model import Samples
from tests.parity.oracle import Task
from tests.support.rank_pool import RankPool

UNEVEN = Samples(images=(1, 0, 2, 1, 3, 1, 0, 1, 2, 1, 1, 0, 3, 2, 1, 1, 2, 3, 1, 1, 0, 1, 1, 1))


class Counts(pl.Callback):
    """Takes what the telemetry holds after each batch, and what torch counts in the second."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []
        self.shown: dict[str, float] = {}
        self._torch = FlopCounterMode(display=False)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self._torch.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self._torch.__exit__(None, None, None)
        sums = trainer.strategy.run.batches._telemetry._sums
        self.found.append({name: figures["flops"] for name, figures in sums.items()})
        self.shown = {name: float(value) for name, value in trainer.callback_metrics.items() if "flops" in name}

    @property
    def of_torch(self) -> int:
        return self._torch.get_total_flops()


def counted(chosen: Task, layout: Layout) -> tuple[list[dict[str, float]], int, dict[str, float]]:
    counts = Counts()
    _, _, strategy = train(chosen, layout, callbacks=(counts,), log_every_n_steps=3)
    strategy.infra.destroy()
    return counts.found, counts.of_torch, counts.shown


def of_step(found: list[tuple[list[dict[str, float]], int, dict[str, float]]], step: int) -> dict[str, float]:
    """Operations of a step by module, over all ranks; what the telemetry holds grows from step to step."""
    sums: dict[str, float] = {}
    for each, _, _ in found:
        for name, value in each[step].items():
            sums[name] = sums.get(name, 0.0) + value - (each[step - 1][name] if step else 0.0)
    return sums


CHANGING = task(samples=UNEVEN, batch=12, steps=3)


def test_predicted_is_what_torch_counts(rank_pool: RankPool) -> None:
    found = rank_pool.run(counted, CHANGING, together(Cut(), Cut(), attention="megatron"), world_size=1)
    ((_, of_torch, shown),) = found
    expected = of_step(found, 1)
    assert of_step(found, 0) != expected, "the batches differ"
    assert sum(expected.values()) == pytest.approx(of_torch, rel=1e-12)
    assert shown["train/tflops_per_gpu"] > 0 and shown["telemetry/images/tflops_per_gpu"] > 0
    assert "train/mfu" not in shown, "the peak of a CPU is unknown"


@pytest.mark.exhaustive
def test_every_layout_has_the_same_operations(rank_pool: RankPool) -> None:
    one = rank_pool.run(counted, CHANGING, together(Cut(), Cut(), attention="megatron"), world_size=1)
    layout = apart(Cut(dp=2), Cut(tp=2, pp=2), num_microbatches=3, attention="megatron")
    found = rank_pool.run(counted, CHANGING, layout, world_size=layout.ranks)
    assert of_step(found, 1) == pytest.approx(of_step(one, 1), rel=1e-3)


@pytest.mark.exhaustive
def test_recomputation_is_not_counted_and_frozen_weights_have_no_gradient(rank_pool: RankPool) -> None:
    plain, again, frozen = (
        of_step(rank_pool.run(counted, each, together(Cut(), Cut(), recompute=recompute), world_size=1), 0)
        for each, recompute in (
            (task(steps=2), None),
            (task(steps=2), Recompute()),
            (task(steps=2, frozen=("images",)), None),
        )
    )
    assert again == pytest.approx(plain, rel=1e-12)
    assert frozen["language"] == plain["language"]
    assert frozen["images"] == pytest.approx(plain["images"] / 3, rel=0.05)

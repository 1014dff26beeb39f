"""A run with balanced batches goes on from its checkpoint in another layout, with balance or without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_mimo import ModuleParallelism
from tests.parity.cases import COSTLY, apart, task, together
from tests.parity.layouts import Layout, train
from tests.support.rank_pool import RankPool

TASK = task(samples=COSTLY, batch=12, steps=4)  # of two batches an epoch: 12 * 2 = 24 samples
BEFORE = apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2), num_microbatches=3)
AFTER = {
    "colocated": together(ModuleParallelism(dp=4), ModuleParallelism(tp=2, dp=2), num_microbatches=1),
    "the same": BEFORE,
}


class Saves(pl.Callback):
    """Saves in the middle of the second epoch."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self._path)


def norms(layout: Layout, *, save: Path | None = None, resume: Path | None = None, balance: bool = True) -> list[float]:
    recorder, _, strategy = train(
        TASK,
        layout,
        callbacks=[] if save is None else [Saves(save)],
        ckpt_path=None if resume is None else str(resume),
        strategy_options={"balance": balance},
    )
    strategy.infra.destroy()
    return recorder.norms


@pytest.mark.exhaustive
def test_run_goes_on_from_a_checkpoint_in_another_layout(rank_pool: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "third.ckpt"
    whole = rank_pool.run(norms, BEFORE, save=path, world_size=4)[0]
    assert len(whole) == 4
    in_order = rank_pool.run(norms, BEFORE, balance=False, world_size=4)[0]
    assert in_order == pytest.approx(whole, rel=1e-10)
    for name, layout in AFTER.items():
        for balance in (True, False):
            (last,) = rank_pool.run(norms, layout, resume=path, balance=balance, world_size=4)[0]
            assert last == pytest.approx(whole[-1], rel=1e-10), (name, balance)

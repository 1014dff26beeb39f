"""The profiler of nothing, and that a user's own stays."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.profilers import SimpleProfiler

from lightning_mimo.strategy.no_profiler import NoProfiler, replace_no_profiler


def trainer_with(profiler: SimpleProfiler | None) -> pl.Trainer:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, profiler=profiler)
    replace_no_profiler(trainer)
    return trainer


def test_nothing_is_profiled_for_less():
    trainer = trainer_with(None)
    assert type(trainer.profiler) is NoProfiler
    with trainer.profiler.profile("step") as action:
        assert action == "step"
    assert trainer.profiler.summary() == ""


def test_profiler_of_a_user_stays():
    profiler = SimpleProfiler()
    assert trainer_with(profiler).profiler is profiler

"""Counts of loss tokens that are no whole numbers: what is learned and logged depends on their proportions only."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_mimo import Checks, ModuleParallelism
from tests.parity.cases import apart, task, together
from tests.parity.layouts import Layout, train, weights
from tests.parity.model import Model, ParityModule, PicturesSoundsAndText, Samples
from tests.support.rank_pool import RankFailure, RankPool
from tests.support.tiers import exhaustive

LAYOUTS = {
    "images_dp2-language_tp2": apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
    "images_dp1-language_dp2": apart(ModuleParallelism(), ModuleParallelism(dp=2)),
    "colocated-images_dp2-language_tp2": together(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
}
SAMPLES = Samples(number=24)


class Weighted(ParityModule):
    """Every token counts for a fraction of one."""

    def __init__(self, model: Model, weight: float) -> None:
        super().__init__(model)
        self._weight = weight

    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        total, tokens, metrics = super().loss(output, batch)
        return total * self._weight, tokens * self._weight, metrics


class Logged(pl.Callback):
    """What was logged, batch by batch and at the end of the validation."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.found.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.found.append(float(trainer.callback_metrics["val/loss"]))


def train_weighted(layout: Layout, weight: float, accumulate: int) -> tuple[list[float], list[float], list[Any]]:
    """Logged losses, gradient norms, and gradients and final weights."""
    logged, what = Logged(), task(samples=SAMPLES, accumulate=accumulate, steps=2)
    recorder, module, strategy = train(
        what,
        layout,
        module=Weighted(what.model, weight),
        callbacks=[logged],
        validation=PicturesSoundsAndText(SAMPLES),
        num_sanity_val_steps=0,
    )
    tensors = [*recorder.gradients, weights(module.model, strategy.infra)]
    strategy.infra.destroy()
    return logged.found, recorder.norms, tensors


@pytest.mark.parametrize(
    ("name", "accumulate"), [*(exhaustive(name, 1) for name in LAYOUTS), ("images_dp2-language_tp2", 2)]
)
def test_counts_below_one_are_divided_by(rank_pool: RankPool, name: str, accumulate: int) -> None:
    layout = LAYOUTS[name]
    whole, parts = (
        # A power of two, so that nothing is rounded.
        rank_pool.run(train_weighted, layout, weight, accumulate, world_size=layout.ranks)
        for weight in (1.0, 2.0**-12)
    )
    for (losses, norms, tensors), (found_losses, found_norms, found_tensors) in zip(whole, parts, strict=True):
        assert len(losses) == 2 * accumulate + (1 if accumulate == 1 else 2)
        assert found_losses == losses
        assert found_norms == norms
        for expected, found in zip(tensors, found_tensors, strict=True):
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def train_negative(layout: Layout, precision: str, on_nonfinite: str) -> None:
    what = task(precision=precision, samples=SAMPLES)
    options = {"checks": Checks(on_nonfinite=on_nonfinite)}
    train(what, layout, module=Weighted(what.model, -1.0), strategy_options=options)


@pytest.mark.parametrize(("precision", "on_nonfinite"), [("32-true", "raise"), ("16-mixed", "skip")])
def test_negative_count_is_refused(rank_pool: RankPool, precision: str, on_nonfinite: str) -> None:
    layout = LAYOUTS["images_dp2-language_tp2"]
    message = r"The loss tokens that loss\(\) returned add up to -\d+ in step 0 \(batch 0\), .*were not updated"
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(train_negative, layout, precision, on_nonfinite, world_size=layout.ranks)

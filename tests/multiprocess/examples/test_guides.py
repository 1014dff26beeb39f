"""What the guides show trains: their models, losses, optimizers and schedules, on the sample of the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_mimo import MimoStrategy
from lightning_mimo import ModuleParallelism as Cut
from tests.parity.layouts import PoolEnvironment
from tests.support.pages import run_blocks
from tests.support.rank_pool import RankPool
from tests.support.tiers import exhaustive

LAYOUTS = {
    "one_process": ({"images": Cut(), "language": Cut()}, True, 1),
    "separate_ranks": ({"images": Cut(dp=2), "language": Cut(tp=2)}, False, 4),
}


def train_guides(optimizers: str, modules: dict[str, Cut], colocate: bool) -> dict[str, float]:
    """Two steps in float64 of the guides' classes together; what was logged last."""
    model, guide = run_blocks(Path("docs/guide/model.md")), run_blocks(Path("docs/guide/optimizer.md"))
    sample = run_blocks(Path("docs/guide/data.md"))["sample"]

    class Documented(guide[optimizers], model["WithSampleLoss"], model["VisionLanguage"]):
        pass

    pl.seed_everything(1)
    pixels = torch.rand(8, 2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    samples: list[dict[str, Any]] = [
        {**sample, "modality_inputs": {"images": {"vit": {"pixel_values": each}}}} for each in pixels
    ]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=MimoStrategy(modules, 4, colocate=colocate, cluster_environment=PoolEnvironment()),
        precision="64-true",
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Documented(), DataLoader(samples, batch_size=4))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.strategy.infra.destroy()
    return logged


@pytest.mark.parametrize("optimizers", ["WithOverrides", exhaustive("WithSchedules")])
def test_classes_of_the_guides_train_the_same_in_any_layout(rank_pool: RankPool, optimizers: str) -> None:
    found = {
        name: rank_pool.run(train_guides, optimizers, modules, colocate, world_size=ranks)
        for name, (modules, colocate, ranks) in LAYOUTS.items()
    }
    (alone,), apart = found.values()
    # Of two tokens for each sample, so twice the loss per token.
    assert alone["train/sample_loss"] == pytest.approx(2 * alone["train/loss"], rel=1e-6)
    for logged in apart:
        for name in ("train/loss", "train/sample_loss", "train/grad_norm"):
            assert logged[name] == pytest.approx(alone[name], rel=1e-6), name

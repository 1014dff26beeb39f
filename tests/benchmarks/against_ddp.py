"""MimoStrategy against Lightning's DDPStrategy on the same ranks: time of a step, and what a rank holds.

Under DDPStrategy every rank runs the encoder and the language model on its share of the batch: the same model, built
whole on every rank, the same initial weights, global batch, loss, clipping and Adam. The last loss of both is compared.

The sleeping model has the proportions of an encoder of 300 M and a language model of 7 B parameters. A forward pass
takes 2 * parameters * tokens operations, a backward pass twice as many. An image is 576 tokens, a sample 640:

    images    2 * 0.3e9 * 576 = 0.35e12      language  2 * 7e9 * 640 = 8.96e12, 26 times as many

Matrices cut by tensor parallelism take their share of the time. What is exchanged takes none here: the activations
inside of tensor-parallel layers, and under DDPStrategy the gradients of 7.3 B parameters. Memory is measured apart,
with parameters of 1/200 of the size.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from megatron.core.optimizer import OptimizerConfig
from torch.utils.data import DataLoader, Dataset

from examples.digits.data import DigitsData
from examples.digits.model import DigitsModule
from lightning_mimo import MimoModelInfra, MimoModule, MimoStrategy, ModuleParallelism
from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.data.loader import shard_dataloader
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.model import build_mimo_model
from lightning_mimo.models.sizes import TransformerSize
from lightning_mimo.parallel.random import seed_megatron
from tests.benchmarks.loading import Moments
from tests.benchmarks.paired import compare
from tests.benchmarks.quiet import quiet_trainer
from tests.benchmarks.report import Cell, Report
from tests.benchmarks.sleeping import Cost, SleepingData, SleepingModule
from tests.parity.layouts import Layout, PoolEnvironment
from tests.support.rank_pool import RankPool
from tests.support.resident import PeakMemory

SEED, LR = 1, 1e-3
PER_RANK = {"digits": 16, "sleeping": 4}  # samples of the global batch for each rank there is
COSTS = {"images": Cost(forward=0.0012, backward=0.0023), "language": Cost(forward=0.03, backward=0.06)}
WEIGHTS = {"images": 300_000_000 // 200, "language": 7_000_000_000 // 200}


def apart(images: ModuleParallelism, language: ModuleParallelism, num_microbatches: int = 1) -> Layout:
    return Layout(modules={"images": images, "language": language}, num_microbatches=num_microbatches)


def together(images: ModuleParallelism, language: ModuleParallelism) -> Layout:
    return Layout(modules={"images": images, "language": language}, colocate=True, num_microbatches=1)


LAYOUTS = {
    "digits": {
        "images_dp2-language_tp2": apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2, dp=1)),
        "images_dp2-language_dp2": apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2)),
        "colocated images_dp4-language_dp4": together(ModuleParallelism(dp=4), ModuleParallelism(dp=4)),
    },
    "sleeping": {
        "images_dp2-language_tp2": apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2, dp=1)),
        "images_dp1-language_pp3, 8 microbatches": apart(ModuleParallelism(dp=1), ModuleParallelism(pp=3, dp=1), 8),
        "colocated images_dp4-language_tp4": together(ModuleParallelism(dp=4), ModuleParallelism(tp=4, dp=1)),
        "images_dp2-language_tp2pp3, 8 microbatches": apart(
            ModuleParallelism(dp=2), ModuleParallelism(tp=2, pp=3, dp=1), 8
        ),
        "colocated images_dp8-language_tp4dp2": together(ModuleParallelism(dp=8), ModuleParallelism(tp=4, dp=2)),
    },
}


class Digits(DigitsModule):
    """The digits model with Adam and a constant learning rate."""

    def configure_optimizers(self):
        return self.build_optimizer(OptimizerConfig(optimizer="adam", lr=LR, weight_decay=0.0, clip_grad=1.0))


class Whole(pl.LightningModule):
    """The model of a MimoModule, all of it on every rank."""

    def __init__(self, module: MimoModule, dataset: Dataset, batch: int) -> None:
        super().__init__()
        self._module, self._dataset, self._batch = (module,), dataset, batch  # a tuple, so that it is no submodule
        self.model: torch.nn.Module | None = None
        self.last_loss = 0.0

    def configure_model(self) -> None:
        if self.model is not None:
            return
        ranks = dist.get_world_size()
        layout = MimoLayout.resolve(
            {"images": ModuleParallelism(dp=ranks), "language": ModuleParallelism(dp=ranks)},
            world_size=ranks,
            colocate=True,
        )
        seed_megatron(layout, dist.get_rank(), seed=SEED)
        self.infra = MimoModelInfra.build(layout)
        self.model = build_mimo_model(self._module[0].configure_mimo(self.infra), self.infra, seed=SEED)

    def train_dataloader(self) -> DataLoader:
        plan = RankBatchPlan.build(
            self.infra.layout, dist.get_rank(), global_batch_size=self._batch, num_microbatches=1
        )
        return shard_dataloader(
            DataLoader(self._dataset, batch_size=self._batch),
            plan,
            sample_format=SampleFormat(
                special_token_ids=self.model.special_token_ids, pad_token_id=self._module[0].pad_token_id
            ),
            seed=SEED,
        )

    def training_step(self, batch: list[dict[str, Any]], batch_idx: int) -> torch.Tensor:
        (one,) = batch
        logits, _ = self.model(
            input_ids=one["input_ids"],
            position_ids=one["position_ids"],
            attention_mask=None,
            modality_inputs=one["modality_inputs"],
            modality_counts=one["modality_counts"],
            token_order=one["token_order"],
        )
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), one["labels"].flatten(), reduction="none"
        )
        loss = (losses * one["loss_mask"].flatten()).sum()
        totals = torch.stack([loss.detach(), one["loss_mask"].sum().float()])
        dist.all_reduce(totals)
        self.last_loss = float(totals[0] / totals[1])
        return loss * dist.get_world_size() / totals[1]  # DDP takes the mean over ranks

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=LR)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one rank saw of one training.

    Attributes:
        seconds: median of the steps after the second.
        peak: bytes, where they were looked at.
        loss: of the last batch.
    """

    seconds: float
    peak: int
    loss: float


def _train(kind: str, layout: Layout | None, steps: int, memory: bool) -> Run:
    """Train in a layout, or under DDPStrategy where it is None. Collective over the world."""
    torch.manual_seed(SEED)
    batch = PER_RANK[kind] * dist.get_world_size()
    dataset, module = _digits(batch * steps) if kind == "digits" else _sleeping(batch * steps, memory)
    moments = Moments()
    how = {"max_epochs": 1, "gradient_clip_val": 1.0, "callbacks": [moments]}
    with ExitStack() as stack:
        peak = stack.enter_context(PeakMemory()) if memory else None
        if layout is None:
            stack.enter_context(megatron_on_cpu())
            module = Whole(module, dataset, batch)
            trainer = quiet_trainer(DDPStrategy(cluster_environment=PoolEnvironment()), **how)
            trainer.fit(module)
            loss, infra = module.last_loss, module.infra
        else:
            strategy = MimoStrategy(
                dict(layout.modules),
                batch,
                layout.num_microbatches,
                colocate=layout.colocate,
                cluster_environment=PoolEnvironment(),
            )
            trainer = quiet_trainer(strategy, **how)
            trainer.fit(module, DataLoader(dataset, batch_size=batch))
            loss, infra = float(trainer.callback_metrics["train/loss"]), strategy.infra
        found = peak.take() if peak else 0
    infra.destroy()
    seconds = [later - earlier for earlier, later in itertools.pairwise(moments.ends[1:])]
    return Run(seconds=statistics.median(seconds), peak=found, loss=loss)


def _digits(samples: int) -> tuple[Dataset, MimoModule]:
    data = DigitsData(train_samples=samples, val_samples=8)
    data.setup("fit")
    vision = TransformerSize(num_layers=2, hidden_size=64, num_attention_heads=4)
    language = TransformerSize(num_layers=3, hidden_size=64, num_attention_heads=4)
    return data.train_set, Digits(vision=vision, language=language)


def _sleeping(samples: int, memory: bool) -> tuple[Dataset, MimoModule]:
    costs = dict.fromkeys(COSTS, Cost(forward=0.0, backward=0.0)) if memory else COSTS
    module = SleepingModule(costs, weights=WEIGHTS if memory else None, optimizer="adam")
    return SleepingData(["images"], length=samples), module


def _memory(kind: str, layout: Layout | None, ranks: int) -> list[Run]:
    fresh = RankPool(ranks)
    runs = fresh.run(_train, kind, layout, 4, True, world_size=ranks, timeout=300)
    fresh.close()
    return runs


def _seconds(pool: RankPool, kind: str, layout: Layout | None, ranks: int, steps: int) -> float:
    return max(run.seconds for run in pool.run(_train, kind, layout, steps, False, world_size=ranks, timeout=300))


def _by_module(layout: Layout, ratios: Mapping[int, float]) -> dict[str, float]:
    """The largest over the ranks of each module."""
    found: dict[str, float] = {}
    for rank, ratio in ratios.items():
        name = ", ".join(layout.modules_of(rank))
        found[name] = max(found.get(name, 0.0), ratio)
    return found


def measure(pool: RankPool, *, quick: bool) -> Report:
    rows: list[list[Cell]] = []
    steps, rounds = (5, 1) if quick else (7, 2)
    ddp: dict[tuple[str, int], list[Run]] = {}
    for kind, layouts in LAYOUTS.items():
        for name, layout in layouts.items():
            ranks = layout.ranks
            if (kind, ranks) not in ddp:
                ddp[kind, ranks] = _memory(kind, None, ranks)
            held, whole = _memory(kind, layout, ranks), ddp[kind, ranks]
            most = max(run.peak for run in whole)
            peaks = _by_module(layout, {rank: run.peak / most for rank, run in enumerate(held)})
            block: Callable[[Layout | None], float] = partial(_block, pool, kind, ranks, steps)
            times = compare(partial(block, layout), partial(block, None), rounds=rounds)
            loss = abs(held[0].loss - whole[0].loss) / whole[0].loss
            memory = "; ".join(f"{who} {ratio:.2f}" for who, ratio in peaks.items())
            spread = min(times.ratios), max(times.ratios), *times.control
            rows.append([kind, name, ranks, times.ratio, *spread, memory, most / 2**20, f"{loss:.0e}"])
    return Report(
        title="MimoStrategy over DDPStrategy on the same ranks: below 1 is less time, or less memory on a rank",
        columns=(
            *("model", "layout", "ranks", "time", "least", "most", "control from", "to"),
            *("peak memory by module", "DDP: MiB", "loss differs by"),
        ),
        rows=rows,
        notes=(
            "time: of a step, over the rounds of A B B A. Memory: the process's own, the largest of a module's ranks.",
            "sleeping: 300 M and 7 B parameters, 26 times the time in the language model; exchanges of activations",
            "inside of a layer and of gradients take no time. Memory: parameters of 1/200 of that, float32, Adam.",
            "digits: all ranks share the machine's cores, so time is that of all work together.",
        ),
    )


def _block(pool: RankPool, kind: str, ranks: int, steps: int, layout: Layout | None) -> float:
    return _seconds(pool, kind, layout, ranks, steps)

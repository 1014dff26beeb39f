"""Steps that are taken, and steps that are left out: loss scale, what is not finite, learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from lightning_mimo import Checks, ModuleParallelism, OptimizerOverride, PerModuleLR
from tests.parity.cases import apart, task, together
from tests.parity.layouts import Layout, parameters, train, weights
from tests.parity.model import LOSS_SCALE, LR, ParityModule, PicturesSoundsAndText, Samples
from tests.parity.oracle import Task
from tests.support.rank_pool import RankFailure, RankPool
from tests.support.tiers import exhaustive

APART = apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2))
PIPELINE = apart(ModuleParallelism(pp=2), ModuleParallelism(pp=2))
COLOCATED = together(ModuleParallelism(dp=2), ModuleParallelism(tp=2))


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a rank saw of one step."""

    scale: float
    rates: list[float]
    skipped: int
    changed: bool
    finite: bool
    loss: float


class Poison(pl.Callback):
    """Makes the gradient of one module's first parameter infinite on some ranks, in some batches."""

    def __init__(self, module: str, rank: int, batches: tuple[int, ...]) -> None:
        self._module, self._rank, self._batches = module, rank, batches
        self._hook: Any = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_rank == self._rank and batch_idx in self._batches:
            name, parameter, _ = next(parameters(pl_module.model, trainer.strategy.infra))
            assert self._module in name
            self._hook = parameter.register_hook(lambda gradient: gradient * math.inf)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self._hook is not None:
            self._hook.remove()


@dataclass
class Diary(pl.Callback):
    """Notes every step."""

    steps: list[Step] = field(default_factory=list)
    before: Any = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.before = weights(pl_module.model, trainer.strategy.infra)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        after = weights(pl_module.model, trainer.strategy.infra)
        optimizer = trainer.optimizers[0]
        self.steps.append(
            Step(
                scale=float(optimizer.mimo.get_loss_scale()),
                rates=[group["lr"] for group in optimizer.param_groups],
                skipped=optimizer.skipped_steps,
                changed=any(not torch.equal(tensor, self.before[name]) for name, tensor in after.items()),
                finite=all(bool(tensor.isfinite().all()) for tensor in after.values()),
                loss=float(trainer.callback_metrics["train/loss"]),
            )
        )


class Scheduled(ParityModule):
    """With a learning rate that halves with every step that a scheduler counts."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def diary(task: Task, layout: Layout, poison: Poison, **strategy_options: Any) -> list[Step]:
    notes = Diary()
    module = Scheduled(task.model)
    *_, strategy = train(task, layout, module=module, callbacks=[poison, notes], strategy_options=strategy_options)
    strategy.infra.destroy()
    return notes.steps


# ---- one loss scale


@pytest.mark.parametrize(
    ("layout", "rank"),
    [(APART, 1), exhaustive(PIPELINE, 0), exhaustive(COLOCATED, 1)],
    ids=["apart", "pipeline", "colocated"],
)
def test_overflow_on_one_rank_skips_the_step_on_all_and_keeps_one_scale(
    rank_pool: RankPool, layout: Layout, rank: int
) -> None:
    run = task(precision="16-mixed", steps=5, samples=Samples(number=60))
    poison = Poison("images", rank, batches=(1, 2))
    by_rank = rank_pool.run(diary, run, layout, poison, world_size=layout.ranks)
    for steps in by_rank:
        assert [step.changed for step in steps] == [True, False, False, True, True]
        # Megatron halves the scale from the second overflow on (hysteresis).
        assert [step.scale / LOSS_SCALE for step in steps] == [1, 1, 0.5, 0.5, 0.5]
        assert [step.skipped for step in steps] == [0, 1, 2, 2, 2]
        # A scheduler that counts steps does not count those that were left out.
        assert [step.rates[0] / LR for step in steps] == pytest.approx([0.5, 0.5, 0.5, 0.25, 0.125])
        assert all(step.finite and math.isfinite(step.loss) for step in steps)


def test_overflow_at_the_smallest_scale_is_an_error(rank_pool: RankPool) -> None:
    run = task(precision="16-mixed", steps=3, samples=Samples(number=60))
    message = r"The gradient of 'images' is not finite in step 1 \(batch 1\)"
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(at_smallest_scale, run, APART, world_size=APART.ranks)


class AtSmallestScale(pl.Callback):
    def on_train_start(self, trainer, pl_module) -> None:
        scaler = trainer.optimizers[0].mimo.grad_scaler
        scaler.min_scale = scaler.scale.clone()


def at_smallest_scale(task: Task, layout: Layout) -> None:
    train(task, layout, callbacks=[AtSmallestScale(), Poison("images", 1, (1,))])


# ---- what is not finite


class OneBadPixel(PicturesSoundsAndText):
    """Sample 17 has a pixel that is not a number."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        if index == 17:
            sample["modality_inputs"]["images"]["vit"]["pixel_values"][-1, 0, 0, 0] = math.nan
        return sample


class LosesOnSample(ParityModule):
    """The loss is infinite where sample 20 is."""

    def loss(self, output: torch.Tensor, batch: dict[str, Any]) -> Any:
        total, tokens, metrics = super().loss(output, batch)
        return total * (math.inf if 20 in batch["sample_indices"] else 1.0), tokens, metrics


class OverflowsInEncoder(ParityModule):
    """In the second step, what the encoder returns is infinite, though weights and images are not."""

    def configure_model(self) -> None:
        super().configure_model()
        if "images" in self.infra.participating_modules:
            encoder = self.model.modality_submodules["images"].encoders["vit"]
            encoder.register_forward_hook(self._overflow)

    def _overflow(self, encoder: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (math.inf if self.trainer.global_step == 1 else 1.0)


def train_with_overflow(task: Task, layout: Layout) -> None:
    train(task, layout, module=OverflowsInEncoder(task.model))


def train_on_bad_pixel(task: Task, layout: Layout) -> None:
    train(task, layout, dataset=OneBadPixel(task.samples))


def train_on_bad_loss(task: Task, layout: Layout) -> None:
    train(task, layout, module=LosesOnSample(task.model))


def train_on_bad_gradient(task: Task, layout: Layout, module: str, rank: int) -> None:
    train(task, layout, callbacks=[Poison(module, rank, (1,))])


BAD_PIXEL = r"the input vit\.pixel_values of module 'images' on rank {rank}, in microbatch 0, samples 17\."


@pytest.mark.parametrize(
    ("layout", "rank", "precision"),
    [exhaustive(APART, 1, "32-true"), (PIPELINE, 0, "bf16-mixed"), exhaustive(COLOCATED, 1, "16-mixed")],
    ids=["apart", "pipeline", "colocated"],
)
def test_input_that_is_not_finite_is_named(rank_pool: RankPool, layout: Layout, rank: int, precision: str) -> None:
    run = task(precision=precision, samples=Samples(images=(2,)))
    with pytest.raises(RankFailure, match=BAD_PIXEL.format(rank=rank)):
        rank_pool.run(train_on_bad_pixel, run, layout, world_size=layout.ranks)


@pytest.mark.parametrize("layout", [exhaustive(APART), COLOCATED], ids=["apart", "colocated"])
def test_output_that_is_not_finite_is_named(rank_pool: RankPool, layout: Layout) -> None:
    message = (
        r"in step 1 \(batch 1\).*is not finite: the output of module 'images' on ranks 0, 1, in microbatch 0, samples"
    )
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(train_with_overflow, task(precision="32-true"), layout, world_size=layout.ranks)


def test_loss_that_is_not_finite_is_named(rank_pool: RankPool) -> None:
    message = (
        r"The loss is not finite in step 1 \(batch 1\); the weights were not updated\. "
        r"The first tensor that is not finite: "
        r"the loss of module 'language' on ranks 2, 3, in microbatch 1, samples 18, 19, 20, 21, 22, 23\."
    )
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(train_on_bad_loss, task(precision="32-true"), APART, world_size=4)


def test_earlier_batch_of_a_window_that_is_not_finite_is_named(rank_pool: RankPool) -> None:
    message = r"in step 0 \(batch 2\).*the loss of batch 1, in the same accumulation window\."
    run = task(precision="32-true", accumulate=3, samples=Samples(number=48, images=(2,)))
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(train_on_bad_pixel, run, APART, world_size=4)


@pytest.mark.parametrize(
    ("module", "rank", "samples"), [("images", 1, "15, 16, 17"), ("language", 2, "12, 13, 14, 15, 16, 17")]
)
def test_gradient_that_is_not_finite_is_named(rank_pool: RankPool, module: str, rank: int, samples: str) -> None:
    message = (
        rf"The gradient of '{module}' is not finite in step 1 \(batch 1\).*the gradient of {module}\.\S+ of module "
        rf"'{module}' on rank {rank}, in microbatch 0, samples {samples}\."
    )
    layout = apart(ModuleParallelism(dp=2), ModuleParallelism())
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(train_on_bad_gradient, task(precision="32-true"), layout, module, rank, world_size=3)


@pytest.mark.parametrize("layout", [exhaustive(APART), COLOCATED], ids=["apart", "colocated"])
def test_steps_that_are_not_finite_can_be_left_out(rank_pool: RankPool, layout: Layout) -> None:
    run = task(precision="bf16-mixed", steps=4, samples=Samples(number=60))
    poison = Poison("images", 1, batches=(1,))
    for steps in rank_pool.run(diary, run, layout, poison, checks=Checks(on_nonfinite="skip"), world_size=layout.ranks):
        assert [step.changed for step in steps] == [True, False, True, True]
        assert [step.skipped for step in steps] == [0, 1, 1, 1]
        assert all(step.finite for step in steps)


# ---- learning rates


class Own(ParityModule):
    """Schedulers by name of the test."""

    def __init__(self, model: Any, kind: str) -> None:
        super().__init__(model)
        self._kind = kind

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": SCHEDULERS[self._kind](optimizer), "interval": "step", "name": "lr"},
        }


def one_per_module(optimizer: torch.optim.Optimizer) -> PerModuleLR:
    lr_scheduler = torch.optim.lr_scheduler
    return PerModuleLR(
        optimizer,
        {
            "images": lambda groups: lr_scheduler.LinearLR(groups, start_factor=0.5, total_iters=2),
            "images.input_projections": lambda groups: lr_scheduler.StepLR(groups, step_size=1, gamma=0.1),
        },
    )


def megatrons(optimizer: torch.optim.Optimizer) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=LR,
        min_lr=0.0,
        lr_warmup_steps=2,
        lr_decay_steps=4,
        lr_decay_style="linear",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=4,
        wd_incr_style="constant",
    )


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "per_module": one_per_module,
    "megatron": megatrons,
    "one_cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=5),
}
PROJECTOR = {"images.input_projections": OptimizerOverride(lr=4 * LR), "language": OptimizerOverride(lr=2 * LR)}


def curves(task: Task, layout: Layout, kind: str, folder: str) -> tuple[dict[str, list[float]], list[list[float]]]:
    """Curves of the monitor, and what megatron-core's optimizers of this rank came to be stepped with."""
    monitor = LearningRateMonitor()
    stepped: list[list[float]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            groups = trainer.optimizers[0].mimo.param_groups
            stepped.append(sorted({group["lr"] for group in groups if group["params"]}))

    logger = CSVLogger(folder)
    *_, strategy = train(
        task, layout, module=Own(task.model, kind), callbacks=[monitor, Look()], logger=logger, log_every_n_steps=1
    )
    strategy.infra.destroy()
    return monitor.lrs, stepped


@pytest.mark.parametrize("layout", [APART, exhaustive(COLOCATED)], ids=["apart", "colocated"])
def test_schedulers_of_single_modules_drive_their_own_curve(rank_pool: RankPool, layout: Layout, tmp_path) -> None:
    run = task(steps=4, samples=Samples(number=60), overrides=PROJECTOR)
    by_rank = rank_pool.run(curves, run, layout, "per_module", str(tmp_path), world_size=layout.ranks)
    expected = {
        "lr/images": [0.5, 0.75, 1, 1],
        "lr/images.input_projections": [4, 0.4, 0.04, 0.004],
        "lr/language": [2, 2, 2, 2],
    }
    for rank, (lrs, stepped) in enumerate(by_rank):
        assert list(lrs) == list(expected)
        for name, rates in expected.items():
            assert [rate / LR for rate in lrs[name]] == pytest.approx(rates), name
        mine = [name for name in expected if any(name.startswith(f"lr/{module}") for module in layout.modules_of(rank))]
        for i, rates in enumerate(stepped):
            assert [rate / LR for rate in rates] == pytest.approx(sorted(expected[name][i] for name in mine))


def test_megatrons_scheduler_counts_optimizer_steps(rank_pool: RankPool, tmp_path) -> None:
    run = task(steps=4, samples=Samples(number=60), overrides={"images": OptimizerOverride(lr=3 * LR, min_lr=LR)})
    for lrs, _ in rank_pool.run(curves, run, APART, "megatron", str(tmp_path), world_size=4):
        assert [rate / LR for rate in lrs["lr/language"]] == pytest.approx([0, 0.5, 1, 0.5])
        assert [rate / LR for rate in lrs["lr/images"]] == pytest.approx([0, 1.5, 3, 2])


def test_one_cycle_also_moves_momentum(rank_pool: RankPool, tmp_path) -> None:
    run = task(steps=3, samples=Samples(number=60))
    for lrs, _ in rank_pool.run(curves, run, COLOCATED, "one_cycle", str(tmp_path), world_size=2):
        assert lrs["lr/images"] == lrs["lr/language"]
        assert lrs["lr/images"][1] > lrs["lr/images"][0]


def test_clipping_is_the_trainers(rank_pool: RankPool) -> None:
    run = task(clip_grad=0.0)
    clipped = rank_pool.run(final_weights, task(clip_grad=0.01), APART, world_size=4)
    for found, expected in zip(rank_pool.run(final_weights, run, APART, 0.01, world_size=4), clipped, strict=True):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def final_weights(task: Task, layout: Layout, clip: float | None = None) -> Any:
    _, module, strategy = train(task, layout, gradient_clip_val=clip)
    found = weights(module.model, strategy.infra)
    strategy.infra.destroy()
    return found

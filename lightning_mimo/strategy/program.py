"""What a Trainer with a MimoStrategy would run in a step, for estimates that run it without the Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl

from lightning_mimo.data.collation import MicrobatchCollator, SampleRequest
from lightning_mimo.data.sample_format import Sample
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.mimo.model import RaggedMimoModel
from lightning_mimo.optim.optimizer import MimoTorchOptimizer
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.planning.gpu_kernels import DeviceType
from lightning_mimo.planning.rank_step import StepSettings, TrainingProgram
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.run import the_only
from lightning_mimo.strategy.step_check import checked_loss
from lightning_mimo.strategy.strategy import MimoStrategy

# Steps of a run whose number depends on data that an estimate does not load; learning-rate schedulers ask for them.
_ANY_NUMBER_OF_STEPS = 1000


def step_settings(strategy: MimoStrategy, layout: MimoLayout, device_type: DeviceType) -> StepSettings:
    """Settings of a step of a strategy.

    Args:
        strategy: the strategy.
        layout: its resolved layout, or another one for the same model.
        device_type: of the run's devices; the strategy of a dry run has an accelerator of this machine.
    """
    return StepSettings(
        layout=layout,
        dtype_policy=strategy.precision_plugin.dtype_policy,
        ddp=strategy.ddp_by_module,
        samples=strategy.global_batch_size // strategy.num_microbatches,
        num_microbatches=strategy.num_microbatches,
        encoder_run_ahead=strategy.encoder_run_ahead,
        device_type=device_type,
    )


@contextmanager
def training_program(module: MimoModule, trainer: pl.Trainer) -> Iterator[TrainingProgram]:
    """The module's own code as a :class:`TrainingProgram`; afterwards module and trainer are as before.

    Args:
        module: module that is not attached to a running trainer.
        trainer: trainer with a MimoStrategy.
    """
    strategy = trainer.strategy
    assert isinstance(strategy, MimoStrategy), "checked by the command line"
    before = module._trainer, module.model, strategy.infra, trainer.__class__
    connected = strategy.lightning_module
    loss = checked_loss(module.loss, type(module).__name__)
    module.trainer = trainer
    strategy.connect(module)  # data modules ask trainer.lightning_module, as ChatData for its processor

    def attach(model: RaggedMimoModel, infra: MimoModelInfra) -> None:
        module.model, strategy.infra = model, infra

    def forward(microbatch: Microbatch) -> Any:
        with module.microbatches():
            return module.training_step(microbatch, 0)

    try:
        trainer.__class__ = _without_data(type(trainer))
        yield TrainingProgram(
            configure=module.configure_mimo,
            attach=attach,
            microbatches=partial(_microbatches, module),
            forward=forward,
            loss=loss,
            optimizer=lambda: _optimizer_of(module.configure_optimizers()),
            frozen=module.frozen,
        )
    finally:
        strategy.connect(connected)  # type: ignore[arg-type]  # None where there was none
        module._trainer, module.model, strategy.infra, trainer.__class__ = before


def _microbatches(module: MimoModule, plan: RankBatchPlan, sample: Sample) -> list[Microbatch]:
    """Microbatches of a rank as its DataLoader would give them if all samples were the same."""
    requests = [
        SampleRequest(
            index=0,
            position=position,
            drawn=position,
            modules=plan.needed_by(position, microbatch),
            epoch=0,
            is_padding=False,
        )
        for microbatch in range(plan.num_microbatches)
        for position in plan.samples_on_rank(microbatch)
    ]
    return MicrobatchCollator(plan, module.sample_format())([(request, sample) for request in requests])


def _without_data(trainer: type[pl.Trainer]) -> type[pl.Trainer]:
    """A Trainer that knows a number of steps without loading the data."""

    class TrainerWithoutData(trainer):  # type: ignore[valid-type, misc]  # a class that is known at run time only
        @property
        def estimated_stepping_batches(self) -> int | float:
            return self.max_steps if self.max_steps > 0 else _ANY_NUMBER_OF_STEPS

    return TrainerWithoutData


def _optimizer_of(configured: Any) -> MimoTorchOptimizer:
    """The optimizer in what ``configure_optimizers()`` returned, in any of Lightning's forms.

    Raises:
        ConfigError: if it is not one optimizer from ``build_optimizer``.
    """
    if isinstance(configured, Mapping):
        configured = configured.get("optimizer")
    if isinstance(configured, tuple) and len(configured) == 2 and isinstance(configured[0], list):
        configured = configured[0]
    found = list(configured) if isinstance(configured, list | tuple) else [configured]
    return the_only([each["optimizer"] if isinstance(each, Mapping) else each for each in found])

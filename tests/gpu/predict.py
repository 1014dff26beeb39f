"""What the package says of a step before it is run: bytes of the dry run, and seconds of the planner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_mimo import MimoStrategy
from lightning_mimo.commands.plan_model import ModelKeys, PlannedModel
from lightning_mimo.planning.costs import StepMemory
from lightning_mimo.planning.gpu_kernels import DeviceType
from lightning_mimo.planning.hardware import Hardware, load_hardware
from lightning_mimo.planning.measure import measured
from lightning_mimo.planning.pricing import price_stages
from lightning_mimo.planning.samples import longest_sample
from lightning_mimo.planning.step import simulate_step
from lightning_mimo.planning.step_estimate import step_estimate
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.program import step_settings, training_program
from tests.gpu.model import build_module
from tests.gpu.run import Run


def predict(run: Run, trainer_of: Callable[[], pl.Trainer]) -> dict[str, Any]:
    """On one device.

    Args:
        run: what is trained.
        trainer_of: makes a Trainer for it.

    Returns:
        ``gib``: bytes at the peak of a step, in GiB, by purpose; ``seconds``: of a step, by what the planner knows of
        the device; ``rates``: what it has measured.
    """
    shipped = load_hardware(_name_of_device())
    device = torch.device("cuda" if run.accelerator == "gpu" else "cpu")
    strategy = trainer_of().strategy
    memory = estimated_memory(build_module(run), trainer_of(), device.type)
    rates = measured(shipped, device, strategy.precision_plugin.dtype_policy.dtype)
    return {
        "gib": {name: size / 2**30 for name, size in {**asdict(memory), "together": memory.tensors}.items()},
        "seconds": {
            "by the shipped figures": _seconds(run, trainer_of(), shipped, None),
            "with measured rates": _seconds(run, trainer_of(), rates, None),
            "with timed layers": _seconds(run, trainer_of(), rates, device),
        },
        "rates": rates.sources[-1],
    }


def _name_of_device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    return next(each for each in ("h200", "h100", "a100", "b200") if each in name)


def estimated_memory(module: MimoModule, trainer: pl.Trainer, device_type: DeviceType) -> StepMemory:
    """Bytes at the peak of a step, of a run on one device."""
    strategy = trainer.strategy
    assert isinstance(strategy, MimoStrategy), "built so"
    settings = step_settings(strategy, strategy.validate(), device_type)
    with training_program(module, trainer) as program:
        sample = longest_sample(settings, program)
        assert not isinstance(sample, str), sample
        (found,) = step_estimate(settings, program, sample)
    return found.memory


def _seconds(run: Run, trainer: pl.Trainer, hardware: Hardware, device: torch.device | None) -> float:
    """Of a step as planned, with layers that are timed on a device, if one is given."""

    def module_with(values: Mapping[str, Any]) -> MimoModule:
        chosen = {"recompute": values["recompute"] is not None} if "recompute" in values else {}
        return build_module(replace(run, **chosen))

    keys = ModelKeys(recompute=("recompute",), sequence_parallel=())
    with closing(PlannedModel(module_with, trainer, keys, device_type=hardware.device_type)) as subject:
        if device is not None:
            subject.time_layers(device, flops=hardware.peak(subject.dtype) * hardware.matmul_efficiency)
        candidate, model = subject.candidate_of_config(), subject.model_of_config
        return simulate_step(candidate, price_stages(candidate, model, hardware), model, hardware).seconds

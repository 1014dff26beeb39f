"""``--dry-run``: checks a run without starting it, and prints the estimated memory of every rank."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from lightning_mimo.commands.step_table import size_text, step_table
from lightning_mimo.data.sample_format import Sample
from lightning_mimo.errors import ConfigError, DataError, MimoError
from lightning_mimo.layout.communicators import largest_buffers
from lightning_mimo.layout.diagram import draw_layout
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import span_of
from lightning_mimo.planning.costs import RankEstimate
from lightning_mimo.planning.gpu_kernels import DeviceType
from lightning_mimo.planning.memory_estimate import MemoryEstimate, StageFootprint, memory_estimate
from lightning_mimo.planning.rank_step import StepSettings, TrainingProgram
from lightning_mimo.planning.samples import longest_sample, look_at, special_tokens
from lightning_mimo.planning.step_estimate import check_set_up, step_estimate
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.precision import MimoPrecision
from lightning_mimo.strategy.program import step_settings, training_program
from lightning_mimo.strategy.strategy import MimoStrategy
from lightning_mimo.strategy.trainer_check import check_trainer

_HEAD = ("ranks", "module", "stage", "parameters", "weights", "gradients", "optimizer", "together")


DryRun = Literal["weights", "step", "data"]
"""``weights`` builds models and optimizers; ``step`` also estimates a step with the longest sample that the model
takes, and ``data`` with the largest one of the training data."""

_MOST_SAMPLES = 200  # that are looked at


def dry_run_report(
    module: MimoModule,
    trainer: pl.Trainer,
    *,
    training: bool,
    kind: DryRun = "weights",
    data: Callable[[], Sequence[Any]] | None = None,
    memory: float | None = None,
    device_type: DeviceType = "cpu",
) -> str:
    """Check a run in one process, and return its layout and estimated memory as text.

    It checks layout, batch sizes, precision and DDP options, and the files that initial weights come from, if they are
    there. It also builds the model of each kind of rank on the meta device, which checks that heads, layers, vocabulary
    and experts divide over tp, pp and ep.

    Args:
        module: module that is not attached to a running trainer.
        trainer: trainer with a MimoStrategy and the number of devices and nodes of the run.
        training: whether to count gradients and optimizer state, and to estimate a step.
        kind: what to estimate.
        data: returns samples of the training data; for ``data`` only.
        memory: bytes of a device, to say whether an estimated step fits; ``None`` if it is not known.
        device_type: of the run's devices.

    Raises:
        ConfigError: if the run is invalid.
    """
    strategy = trainer.strategy
    assert isinstance(strategy, MimoStrategy), "checked by the command line"
    if dist.is_initialized():
        raise ConfigError(
            "A dry run needs a process in which torch.distributed is not initialized: start it separately."
        )
    check_trainer(trainer, module)
    layout = strategy.validate()
    module.check_layout(layout)
    missing = module.missing_files()
    if missing is None:
        module.check_weights(layout)
    precision = strategy.precision_plugin
    assert isinstance(precision, MimoPrecision), "MimoStrategy converts every other"
    found = memory_estimate(
        layout,
        module.configure_mimo,
        dtype_policy=precision.dtype_policy,
        ddp=strategy.ddp_by_module,
        frozen=module.frozen,
        training=training,
    )
    picture = draw_layout(
        layout, global_batch_size=strategy.global_batch_size, num_microbatches=strategy.num_microbatches
    )
    described = describe(found, layout, precision=precision.precision, training=training, device_type=device_type)
    text = f"{picture}\n\n{described}"
    if training:
        text += _step_report(module, trainer, step_settings(strategy, layout, device_type), kind, data, memory)
    return text if missing is None else f"{text}\n\nnot checked: the weights. {missing}"


def _step_report(
    module: MimoModule,
    trainer: pl.Trainer,
    settings: StepSettings,
    kind: DryRun,
    data: Callable[[], Sequence[Any]] | None,
    memory: float | None,
) -> str:
    """Build the optimizer of each kind of rank, and describe a step where it is to be estimated."""
    lines = [""]
    with training_program(module, trainer) as program:
        if kind == "weights":
            return _checked_set_up(settings, program)
        if kind == "data" and data is not None:
            sizes, sample = look_at(data(), special_tokens(settings, program))
            lines += ["", f"the first {sizes.number} samples have", *(f"  {line}" for line in sizes.lines())]
            estimates = step_estimate(settings, program, sample)
        else:
            found = _of_longest_sample(settings, program, module.extra_keys)
            if isinstance(found, str):
                fits = "" if memory is None else f"\nnot checked: whether it fits {size_text(int(memory))}"
                return f"{_checked_set_up(settings, program)}\n\nnot estimated: a step, because {found}{fits}"
            estimates, sample = found
    items = " and one item for each encoder" if kind == "step" else ""
    lines += ["", f"one step, if every sample has {len(sample['input_ids'])} tokens{items}:"]
    return "\n".join([*lines, "", step_table(estimates, settings.layout, memory=memory)])


def _of_longest_sample(
    settings: StepSettings, program: TrainingProgram, extra_keys: Sequence[str]
) -> tuple[tuple[RankEstimate, ...], Sample] | str:
    """The estimate and its sample, or the reason why there is none: the user's code may need what only a run has."""
    with_data = "; --dry-run=data takes samples of the training data"
    if extra_keys:
        return f"samples have the extra keys {', '.join(extra_keys)}{with_data}"
    try:
        sample = longest_sample(settings, program)
        return f"{sample}{with_data}" if isinstance(sample, str) else (step_estimate(settings, program, sample), sample)
    except DataError as error:  # of a sample that is not the user's
        return f"{error}{with_data}"
    except MimoError:
        raise
    except Exception as error:
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        place = f"{Path(frame.f_code.co_filename).name}:{line}"
        return f"{type(error).__name__} was raised on tensors without values, at {place}: {error}{with_data}"


def _checked_set_up(settings: StepSettings, program: TrainingProgram) -> str:
    """Build the optimizer; a note if the user's code cannot do that without a run."""
    try:
        check_set_up(settings, program)
    except MimoError:
        raise
    except Exception as error:  # of the user's code, which may need what only a run has
        return f"\n\nnot checked: the optimizer, because configure_optimizers() raised {type(error).__name__}: {error}"
    return ""


def first_samples(trainer: pl.Trainer, data: pl.LightningDataModule) -> list[Any]:
    """The first samples of the training data.

    Raises:
        ConfigError: if ``train_dataloader()`` returns no DataLoader, or one of a stream.
    """
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f"train_dataloader() returned a {type(loader).__name__}; to look at samples, there must be one DataLoader."
        )
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset):
        raise ConfigError(
            f"The training data is a stream ({type(dataset).__name__}), whose samples differ by rank; plan and "
            f"estimate with the longest sample, the default."
        )
    return [dataset[index] for index in range(min(len(dataset), _MOST_SAMPLES))]


def describe(
    found: MemoryEstimate, layout: MimoLayout, *, precision: str, training: bool, device_type: DeviceType = "cuda"
) -> str:
    """Return the memory estimate as a table, with a note on what is not counted.

    Args:
        found: the estimate.
        layout: layout of the run; for colocated modules the table has a line with their sum.
        precision: name of the precision.
        training: whether gradients and optimizer state were counted.
        device_type: of the run's devices.
    """
    rows = [_HEAD, *(_row(stage, layout) for stage in found.stages)]
    if layout.colocated and len(layout.modules) > 1:
        rows.append(_sum(found, layout))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = [
        "  ".join(_aligned(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    modules = ", ".join(f"{name} {_number(count)}" for name, count in found.parameters.items())
    lines = [f"{_number(sum(found.parameters.values()))} parameters ({modules})", "", *lines, ""]
    if (trained := sum(found.trained.values())) != sum(found.parameters.values()):
        lines[0] += f", {_number(trained)} of them trained"
    lines.append(f"on each rank, in {precision}" + (", with Adam" if training else "") + "; not counted: activations,")
    lines.append("buffers of collectives, CUDA's and the allocator's own memory")
    if training and layout.world_size > 1 and device_type == "cuda":
        lines += ["", *_communicator_lines(found, layout)]
    return "\n".join(lines)


def _communicator_lines(found: MemoryEstimate, layout: MimoLayout) -> list[str]:
    """Memory of NCCL's communicators, which exist on GPUs only; of the rank of each stage that has the most."""
    frozen = [name for name, count in found.trained.items() if count == 0]
    lines = ["on GPUs also, for NCCL's communicators (as reported for A100; not measured):"]
    for ranks in dict.fromkeys(stage.ranks for stage in found.stages):
        size, made = largest_buffers(layout, ranks, frozen=frozen)
        lines.append(f"  {size_text(size)} on {span_of(ranks)}, {len(made)} communicators")
    return lines


def _row(stage: StageFootprint, layout: MimoLayout) -> tuple[str, ...]:
    numbers = (stage.weights, stage.gradients, stage.optimizer, stage.total)
    place = f"{stage.stage + 1} of {layout.modules[stage.module].pp}"
    return (span_of(stage.ranks), stage.module, place, _number(stage.parameters), *map(size_text, numbers))


def _sum(found: MemoryEstimate, layout: MimoLayout) -> tuple[str, ...]:
    totals = [sum(getattr(stage, what) for stage in found.stages) for what in ("weights", "gradients", "optimizer")]
    parameters = sum(stage.parameters for stage in found.stages)
    ranks = span_of(range(layout.world_size))
    return (ranks, "all", "", _number(parameters), *map(size_text, [*totals, sum(totals)]))


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)


def _number(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)

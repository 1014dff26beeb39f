"""``--dry-run``: checks a run without starting it, and prints the estimated memory of every rank."""

from __future__ import annotations

import lightning.pytorch as pl
import torch.distributed as dist

from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.diagram import draw_layout
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import span_of
from lightning_mimo.planning.memory_estimate import MemoryEstimate, StageFootprint, memory_estimate
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.precision import MimoPrecision
from lightning_mimo.strategy.strategy import MimoStrategy
from lightning_mimo.strategy.trainer_check import check_trainer

_HEAD = ("ranks", "module", "stage", "parameters", "weights", "gradients", "optimizer", "together")


def dry_run_report(module: MimoModule, trainer: pl.Trainer, *, training: bool) -> str:
    """Check a run in one process, and return its layout and estimated memory as text.

    It checks layout, batch sizes, precision and DDP options, and the files that initial weights come from, if they are
    there. It also builds the model of each kind of rank on the meta device, which checks that heads, layers, vocabulary
    and experts divide over tp, pp and ep.

    Args:
        module: module that is not attached to a running trainer.
        trainer: trainer with a MimoStrategy and the number of devices and nodes of the run.
        training: whether to count gradients and optimizer state.

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
    text = f"{picture}\n\n{describe(found, layout, precision=precision.precision, training=training)}"
    return text if missing is None else f"{text}\n\nnot checked: the weights. {missing}"


def describe(found: MemoryEstimate, layout: MimoLayout, *, precision: str, training: bool) -> str:
    """Return the memory estimate as a table, with a note on what is not counted.

    Args:
        found: the estimate.
        layout: layout of the run; for colocated modules the table has a line with their sum.
        precision: name of the precision.
        training: whether gradients and optimizer state were counted.
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
    return "\n".join(lines)


def _row(stage: StageFootprint, layout: MimoLayout) -> tuple[str, ...]:
    numbers = (stage.weights, stage.gradients, stage.optimizer, stage.total)
    place = f"{stage.stage + 1} of {layout.modules[stage.module].pp}"
    return (span_of(stage.ranks), stage.module, place, _number(stage.parameters), *map(_bytes, numbers))


def _sum(found: MemoryEstimate, layout: MimoLayout) -> tuple[str, ...]:
    totals = [sum(getattr(stage, what) for stage in found.stages) for what in ("weights", "gradients", "optimizer")]
    parameters = sum(stage.parameters for stage in found.stages)
    ranks = span_of(range(layout.world_size))
    return (ranks, "all", "", _number(parameters), *map(_bytes, [*totals, sum(totals)]))


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)


def _number(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"

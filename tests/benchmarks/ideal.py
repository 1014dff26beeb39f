"""The 1F1B schedule of a layout as an event simulation in which communication takes no time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from tests.benchmarks.sleeping import Cost

Task = tuple[str, int, int, str]
"""(module, stage, microbatch, "forward" or "backward")."""


def ideal_seconds(
    layout: MimoLayout,
    costs: Mapping[str, Cost],
    *,
    num_microbatches: int,
    encoder_run_ahead: int = 0,
    uneven: Sequence[float] = (1.0,),
) -> float:
    """Seconds of one step if every stage began each task as soon as it is its turn and its inputs exist.

    The order of a stage's tasks is that of Megatron's schedule, as it is run: as many forward passes first as there are
    stages behind it, then backward and forward in turn.

    Args:
        layout: of modules with ranks of their own.
        costs: seconds of one pipeline stage for one microbatch, by module.
        num_microbatches: of the step.
        encoder_run_ahead: forward passes that encoders begin with beside those.
        uneven: how much longer than that encoders take for one microbatch and the next, over and over.
    """
    sizes = layout.modules
    orders: dict[tuple[str, int], list[Task]] = {}
    for name, each in sizes.items():
        for stage in range(each.pp):
            behind = each.pp - 1 - stage + (0 if name == LANGUAGE else sizes[LANGUAGE].pp + encoder_run_ahead)
            orders[name, stage] = _one_f_one_b(name, stage, min(behind, num_microbatches), num_microbatches)
    ends: dict[Task, float] = {}
    free = dict.fromkeys(orders, 0.0)
    while any(orders.values()):
        progress = False
        for place, order in orders.items():
            while order and all(need in ends for need in _needs(layout, order[0])):
                task = order.pop(0)
                start = max([free[place], *(ends[need] for need in _needs(layout, task))])
                name, _, microbatch, direction = task
                seconds = costs[name].forward if direction == "forward" else costs[name].backward
                factor = 1.0 if name == LANGUAGE else uneven[microbatch % len(uneven)]
                free[place] = ends[task] = start + factor * seconds
                progress = True
        assert progress, "no task can begin"
    return max(ends.values())


def _one_f_one_b(name: str, stage: int, warmup: int, microbatches: int) -> list[Task]:
    forwards = [(name, stage, i, "forward") for i in range(microbatches)]
    backwards = [(name, stage, i, "backward") for i in range(microbatches)]
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[microbatches - warmup :]


def _needs(layout: MimoLayout, task: Task) -> list[Task]:
    """Tasks whose results a task takes, on other stages or its own."""
    name, stage, microbatch, direction = task
    last = layout.modules[name].pp - 1
    if direction == "forward":
        if stage > 0:
            return [(name, stage - 1, microbatch, direction)]
        into = layout.encoders if name == LANGUAGE else ()
        return [(encoder, layout.modules[encoder].pp - 1, microbatch, direction) for encoder in into]
    if stage < last:
        return [(name, stage + 1, microbatch, direction)]
    if name == LANGUAGE:
        return [(name, stage, microbatch, "forward")]
    return [(LANGUAGE, 0, microbatch, direction)]

"""What a plan looks like as text: the best layouts, why the second lost, and what was not modelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.planning.candidate import Model
from lightning_mimo.planning.hardware import Hardware
from lightning_mimo.planning.search import USABLE, Found, Plan
from lightning_mimo.planning.simulation import Simulation

NOT_MODELLED = (
    "loading of data, evaluation, checkpoints, the first steps",
    "congestion of the network by other jobs, and other topologies than full bandwidth between all nodes",
    "the efficiency of small matrix products; clocks that sink under load",
    "memory of the batch itself, of CUDA, communicators and fragmentation, for which "
    f"{1 - USABLE:.0%} of the device is left",
    "expt_tp and cp",
)
_HEAD = ("", "layout", "step s", "with data", "tokens/s/GPU", "MFU", "GiB", "bubble", "who waits for whom")

Share = Callable[[str], float]
"""Module -> share of its work in a step of equal samples that the samples of a batch need, padding left out."""


def describe_plans(
    found: Found,
    model: Model,
    hardware: Hardware,
    *,
    with_data: Sequence[float] | None = None,
    share: Share | None = None,
) -> str:
    """The best layouts as a table, one per line.

    Args:
        found: outcome of the search.
        model: costs and batches.
        hardware: devices.
        with_data: seconds of each plan's step with differing samples; ``None`` leaves the column out.
        share: of the work of a step that differing samples need; ``None`` for all of it.
    """
    rows = [_HEAD]
    for i, plan in enumerate(found.plans):
        seconds = plan.seconds if with_data is None else with_data[i]
        rows.append(
            (
                str(i + 1),
                str(plan.candidate),
                f"{plan.seconds:.3f}",
                f"{seconds:.3f}",
                f"{tokens_per_sec(plan, model, seconds, share=share):,.0f}",
                f"{mfu(plan, model, hardware, seconds, share=share):.1%}",
                f"{max(plan.memory.values()) / 2**30:.1f}",
                f"{plan.simulation.bubble:.0%}",
                _waits(plan.simulation),
            )
        )
    if with_data is None:
        rows = [row[:3] + row[4:] for row in rows]  # type: ignore[misc]
    return table(rows, left=(1, len(rows[0]) - 1))


def table(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> str:
    """Rows of equal length as aligned text, with a line under the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def tokens_per_sec(plan: Plan, model: Model, seconds: float, *, share: Share | None = None) -> float:
    """Tokens of the language module per second and device, of all devices that the layout has, busy or not."""
    tokens = model.global_batch_size * model.tokens * (1.0 if share is None else share(LANGUAGE))
    return tokens / seconds / plan.candidate.layout.world_size


def mfu(plan: Plan, model: Model, hardware: Hardware, seconds: float, *, share: Share | None = None) -> float:
    """Model FLOPs utilization: arithmetic of forward and backward, without recomputation, over all devices' peak."""
    of_prices = sum(
        price.flops * price.ranks * (1.0 if share is None else share(price.module)) for price in plan.prices
    )
    flops = plan.candidate.num_microbatches * of_prices
    return flops / (seconds * plan.candidate.layout.world_size * hardware.peak(model.dtype))


def _waits(simulation: Simulation) -> str:
    """The two longest waits, as shares of the step."""
    longest = sorted(simulation.waits.items(), key=lambda item: -item[1])[:2]
    words = [
        f"{waiter} for {'its own stages' if waiter == other else other} {seconds / simulation.seconds:.0%}"
        for (waiter, other), seconds in longest
        if seconds >= 0.005 * simulation.seconds
    ]
    return ", ".join(words) or "none"


def breakdown(simulation: Simulation) -> dict[str, float]:
    """Seconds of the rank that is last, by what it does; they add up to the step."""
    last = max(range(len(simulation.stages)), key=simulation.reduced.__getitem__)
    busy, ended = simulation.busy(last), simulation.passes[last][-1].end
    return {
        "computing": busy,
        "waiting for other ranks": ended - busy,
        "reducing gradients": simulation.reduced[last] - ended,
        "sum over all ranks and the host": simulation.sum_seconds,
        "the update": simulation.seconds - simulation.summed,
    }


def why_it_lost(best: Plan, other: Plan, *, with_data: Sequence[float] | None = None) -> str:
    """In a sentence, what the second plan spends more time on than the best one.

    Args:
        best: the best plan.
        other: the second one.
        with_data: seconds of their steps with differing samples; ``None`` if they were not simulated with any.
    """
    if with_data is not None and other.seconds <= best.seconds:
        slower = with_data[1] / with_data[0] - 1
        return (
            f"The second one is {slower:.1%} slower with differing samples ({with_data[1] - with_data[0]:+.3f} s): "
            f"their padding, and waiting for the largest of them, cost it more. With equal samples it is faster "
            f"({other.seconds - best.seconds:+.3f} s)."
        )
    one, two = breakdown(best.simulation), breakdown(other.simulation)
    slower = other.seconds / best.seconds - 1
    what = max(one, key=lambda name: two[name] - one[name])
    names = [plan.simulation.stages[_last(plan)].key[0] for plan in (best, other)]
    saved = min(one, key=lambda name: two[name] - one[name])
    text = (
        f"The second one is {slower:.1%} slower ({other.seconds - best.seconds:+.3f} s)"
        f"{'' if with_data is None else ' with equal samples'}. Its last rank, of {names[1]}, "
        f"spends {two[what] - one[what]:+.3f} s on {what} ({two[what]:.3f} s; the best one's, of {names[0]}, "
        f"{one[what]:.3f} s)"
    )
    if two[saved] < one[saved]:
        text += f", and {two[saved] - one[saved]:+.3f} s on {saved}"
    return text + "."


def _last(plan: Plan) -> int:
    return max(range(len(plan.simulation.stages)), key=plan.simulation.reduced.__getitem__)


def describe_memory(plan: Plan, memory: float) -> str:
    """Peak memory of every kind of rank of a plan, on one line."""
    stages = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in plan.memory.items())
    return f"memory of a rank in GiB, of {memory / 2**30:.1f}: {stages}"


def describe_search(found: Found, seconds: float) -> str:
    """How much was searched."""
    return (
        f"{found.layouts:,} layouts; {found.priced:,} layouts with settings were priced, of which {found.too_large:,} "
        f"do not fit the memory; {found.simulated:,} steps were simulated, a lower bound rules out the others. "
        f"{seconds:.1f} s"
    )


def describe_limits(hardware: Hardware, timing: Sequence[str] = ()) -> str:
    """What the prices rest on.

    Args:
        hardware: devices.
        timing: lines on the layers that were timed.
    """
    lines = [f"Prices are a model of {hardware.name}, not a measurement:"]
    lines += [*(f"  {source}" for source in hardware.sources), *timing]
    lines += ["Not modelled:", *(f"  {each}" for each in NOT_MODELLED)]
    return "\n".join(lines)

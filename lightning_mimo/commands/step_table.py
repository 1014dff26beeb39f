"""The estimate of a step as text: memory of each kind of rank, arithmetic, and what is sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import span_of
from lightning_mimo.planning.costs import Message, RankEstimate, add_messages
from lightning_mimo.planning.search import USABLE

_HEAD = (
    "ranks",
    "module",
    "weights",
    "gradients",
    "optimizer",
    "batch",
    "activations",
    "communicators",
    "at most",
    "TFLOP",
)


def step_table(estimates: Sequence[RankEstimate], layout: MimoLayout, *, memory: float | None = None) -> str:
    """A table with a line for each kind of rank, and below it when the peak is and what is sent in a step.

    Args:
        estimates: of all kinds of ranks.
        layout: of the run.
        memory: bytes of a device, to say which ranks fit; ``None`` if it is not known.
    """
    rows = [_HEAD, *(_row(each, layout) for each in estimates)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join(_aligned(row[i], width, i) for i, width in enumerate(widths)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    notes = [*_notes(estimates, layout), *([] if memory is None else ["", _fit(estimates, layout, memory)])]
    return "\n".join([*(line.rstrip() for line in lines), "", *notes])


def size_text(count: int) -> str:
    """A number of bytes in the largest unit of which it is at least one."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _fit(estimates: Sequence[RankEstimate], layout: MimoLayout, memory: float) -> str:
    """Which kinds of ranks fit a device, of which a plan leaves as much free."""
    sizes = ", ".join(f"{_name(each, layout)} {each.memory.total / 2**30:.1f}" for each in estimates)
    too_large = [_name(each, layout) for each in estimates if each.memory.total > USABLE * memory]
    verdict = f"{', '.join(too_large)} {'do' if len(too_large) > 1 else 'does'} not fit" if too_large else "all fit"
    limit = f"the {USABLE:.0%} of it that are not left for CUDA and its allocator"
    return f"memory of a rank in GiB, of {memory / 2**30:.1f}: {sizes}\n{verdict} in {limit}"


def _row(estimate: RankEstimate, layout: MimoLayout) -> tuple[str, ...]:
    memory = estimate.memory
    tensors = (memory.weights, memory.gradients, memory.optimizer, memory.batch, memory.activations)
    flops = estimate.forward_flops + estimate.backward_flops + estimate.recompute_flops
    cells = [size_text(size) for size in (*tensors, memory.communicators, memory.total)]
    return (span_of(estimate.ranks), _name(estimate, layout), *cells, f"{flops / 1e12:.1f}")


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _name(estimate: RankEstimate, layout: MimoLayout) -> str:
    return " + ".join(
        f"{module} {stage + 1}/{layout.modules[module].pp}" if layout.modules[module].pp > 1 else module
        for module, stage in estimate.stages.items()
    )


def _notes(estimates: Sequence[RankEstimate], layout: MimoLayout) -> Iterator[str]:
    if any(each.memory.communicators for each in estimates):
        yield "communicators are NCCL's, on GPUs only: as reported for A100, not measured"
    for each in estimates:
        share = each.recompute_flops / (each.forward_flops + each.backward_flops + each.recompute_flops or 1)
        again = f", {share:.0%} of its arithmetic is recomputed" if share else ""
        yield f"{_name(each, layout)}: the most memory is used in {each.peak_at}{again}"
        if sent := ", ".join(_sent(each)):
            yield f"  sends in a step: {sent}"


def _sent(estimate: RankEstimate) -> Iterator[str]:
    """Bytes by axis and edge in one step, the most first."""
    per_microbatch = [
        message
        for work in estimate.work.values()
        for pass_ in (work.forward, work.backward, work.recompute)
        for message in pass_.scaled(estimate.num_microbatches).messages
    ]
    sums: dict[str, int] = {}
    for message in add_messages([*per_microbatch, *estimate.step.messages]):
        sums[message.over] = sums.get(message.over, 0) + _on_the_wire(message)
    for over, size in sorted(sums.items(), key=lambda item: -item[1]):
        if size:
            yield f"{over} {size_text(size)}"


def _on_the_wire(message: Message) -> int:
    """Bytes that a rank sends, of a collective with a ring."""
    size = len(message.ranks)
    factor = {"all_reduce": 2 * (size - 1) / size, "send": 1.0, "broadcast": 1.0}.get(
        message.operation, (size - 1) / size
    )
    return round(message.bytes * factor)

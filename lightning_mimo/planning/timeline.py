"""Simulated steps in the form of recorded ones, so that both are drawn and compared by the same code."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_mimo.observe.spans import SpanInfo
from lightning_mimo.observe.trace import RankTrace, TracedSpan
from lightning_mimo.planning.simulation import Segment, SimulatedPass, SimulatedStage, Simulation


def traces_of(simulation: Simulation) -> list[RankTrace]:
    """One trace per simulated stage, which stands for all ranks that do the same."""
    return [_trace(simulation, i) for i in range(len(simulation.stages))]


def _trace(simulation: Simulation, index: int) -> RankTrace:
    stage = simulation.stages[index]
    name, number, replica = stage.key
    return RankTrace(
        rank=index,
        modules=tuple(name.split(" and ")),
        label=f"dp{replica}, {stage.ranks} rank{'s' if stage.ranks > 1 else ''}",
        stage=number,
        begin=0.0,
        end=simulation.seconds,
        spans=tuple(_spans(simulation, index)),
    )


def _spans(simulation: Simulation, index: int) -> Iterator[TracedSpan]:
    stage, passes = simulation.stages[index], simulation.passes[index]
    for each in passes:
        if each.waited_for is not None:
            inside = each.waited_for[0] == stage.key[0]
            kind, label = ("pipeline" if inside else "bridge"), f"wait for {each.waited_for[0]}"
            yield _span(kind, label, stage.key[0], each.begin - each.waited, each.begin, each.microbatch)
        yield from _segments(stage, each)
    ended, reduced = passes[-1].end, simulation.reduced[index]
    if reduced > ended:
        yield _span("reduce", "reduce gradients", stage.key[0], ended, reduced)
    yield _span("sum", "add up losses and norms of all ranks", "", reduced, simulation.summed)
    if stage.update:
        yield _span("optimizer", "update", stage.key[0], simulation.summed, simulation.summed + stage.update)


def _segments(stage: SimulatedStage, each: SimulatedPass) -> Iterator[TracedSpan]:
    segments: tuple[Segment, ...] = stage.forward if each.direction == "forward" else stage.backward
    begin = each.begin
    for segment in segments:
        end = begin + segment.seconds[each.microbatch]
        if end > begin:
            yield _span(
                segment.kind, f"{segment.kind} of {segment.module}", segment.module, begin, end, each.microbatch
            )
        begin = end


def _span(kind: str, label: str, module: str, begin: float, end: float, microbatch: int | None = None) -> TracedSpan:
    info = SpanInfo(kind=kind, label=label, module=module)
    return TracedSpan(info=info, depth=0, microbatch=microbatch, begin=begin, end=end)

"""Simulates one training step of a layout: what every kind of rank does when, and whom it waits for.

Pure Python. Every pipeline stage runs its passes in the order of :mod:`lightning_mimo.layout.pass_order`, which is the
order of the real schedule. A pass begins when the stage is free and its inputs have arrived. Transfers take time on
their way and do not occupy the sender. After the passes come the gradient reduction, the sum over all ranks and the
optimizer. Ranks that do the same at the same time are simulated once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lightning_mimo.layout.pass_order import Direction, Pass, order_of_passes

StageKey = tuple[str, int, int]
"""(module, pipeline stage, data-parallel replica)."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of every pass in one direction.

    Attributes:
        module: whose work it is.
        kind: ``forward``, ``backward`` or ``bridge``, as in traces.
        seconds: one value per microbatch.
    """

    module: str
    kind: str
    seconds: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Edge:
    """Transfer of activations or gradients from another stage.

    Attributes:
        source: stage that sends.
        seconds: from the end of the sender's pass until the data of a microbatch have arrived.
    """

    source: StageKey
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SimulatedStage:
    """One pipeline stage of one replica, or the modules that share its ranks.

    Attributes:
        key: module (``images and language`` where they share ranks), stage and replica.
        ranks: how many ranks do the same.
        behind: number of forward passes that it runs first.
        forward: segments of a forward pass, in their order.
        backward: segments of a backward pass, in their order.
        activations: where a forward pass's inputs come from.
        gradients: where a backward pass's inputs come from.
        reduce: seconds of the gradient reduction.
        last_bucket: seconds of the part of the reduction that can only begin after the last backward pass; the rest of
            it overlaps that pass. Equal to ``reduce`` where nothing overlaps.
        update: seconds of the optimizer and of the all-gather of weights.
    """

    key: StageKey
    ranks: int
    behind: int
    forward: tuple[Segment, ...]
    backward: tuple[Segment, ...]
    activations: tuple[Edge, ...] = ()
    gradients: tuple[Edge, ...] = ()
    reduce: float = 0.0
    last_bucket: float = 0.0
    update: float = 0.0

    def totals(self, direction: Direction) -> list[float]:
        """Seconds of a pass, one value per microbatch."""
        segments = self.forward if direction == "forward" else self.backward
        return [sum(values) for values in zip(*(segment.seconds for segment in segments), strict=True)]


@dataclass(frozen=True, kw_only=True)
class SimulatedPass:
    """One pass.

    Attributes:
        direction: ``forward`` or ``backward``.
        microbatch: its index.
        begin: seconds since the begin of the step.
        end: like ``begin``.
        waited_for: stage whose data came last, if the pass waited for them.
        waited: seconds for which it waited.
    """

    direction: Direction
    microbatch: int
    begin: float
    end: float
    waited_for: StageKey | None = None
    waited: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A simulated step.

    Attributes:
        stages: the stages, as they were given.
        records: for each stage and pass, in their order: pass, begin, end, index of the stage that it waited for or -1,
            and seconds of waiting.
        reduced: for each stage, when its gradients are reduced, in seconds since the begin of the step.
        sum_seconds: of the all-reduce over all ranks, and of the host's work around the step.
    """

    stages: Sequence[SimulatedStage]
    records: Sequence[Sequence[tuple[Pass, float, float, int, float]]]
    reduced: Sequence[float]
    sum_seconds: float = 0.0

    @cached_property
    def passes(self) -> list[list[SimulatedPass]]:
        """For each stage, its passes in their order."""
        return [
            [
                SimulatedPass(
                    direction=direction,
                    microbatch=microbatch,
                    begin=begin,
                    end=end,
                    waited_for=None if source < 0 else self.stages[source].key,
                    waited=waited,
                )
                for (direction, microbatch), begin, end, source, waited in records
            ]
            for records in self.records
        ]

    @cached_property
    def seconds(self) -> float:
        """Seconds of the step."""
        return self.summed + max(stage.update for stage in self.stages)

    @cached_property
    def summed(self) -> float:
        """When the all-reduce over all ranks ends."""
        return max(self.reduced) + self.sum_seconds

    def busy(self, index: int) -> float:
        """Seconds in which a stage computes forward and backward passes."""
        return sum(end - begin for _, begin, end, _, _ in self.records[index])

    @cached_property
    def bubble(self) -> float:
        """Share of the step in which ranks compute neither passes nor the update, as the mean over all ranks."""
        ranks = sum(stage.ranks for stage in self.stages)
        work = sum(stage.ranks * (self.busy(i) + stage.update) for i, stage in enumerate(self.stages))
        return 1 - work / (ranks * self.seconds)

    @cached_property
    def waits(self) -> dict[tuple[str, str], float]:
        """(waiting module, module that it waits for) -> seconds, as the mean over the waiting module's ranks.

        Waiting at the end of the step, for the slowest rank, is under the name of that rank's module.
        """
        sums: dict[tuple[str, str], float] = {}
        ranks: dict[str, int] = {}
        slowest = self.stages[max(range(len(self.stages)), key=self.reduced.__getitem__)].key[0]
        for i, stage in enumerate(self.stages):
            name = stage.key[0]
            ranks[name] = ranks.get(name, 0) + stage.ranks
            waits = [(each.waited_for[0], each.waited) for each in self.passes[i] if each.waited_for is not None]
            for source, seconds in [*waits, (slowest, max(self.reduced) - self.reduced[i])]:
                if seconds > 0:
                    sums[name, source] = sums.get((name, source), 0.0) + seconds * stage.ranks
        return {pair: seconds / ranks[pair[0]] for pair, seconds in sums.items()}


@dataclass
class _Running:
    """State of one stage while it is simulated."""

    order: list[Pass]
    totals: dict[Direction, list[float]]
    inputs: dict[Direction, list[tuple[int, float]]]
    receivers: list[int] = field(default_factory=list)
    clock: float = 0.0
    begins: list[float] = field(default_factory=list)  # of forward passes
    ends: dict[Direction, list[float]] = field(default_factory=lambda: {"forward": [], "backward": []})
    records: list[tuple[Pass, float, float, int, float]] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)  # stages that cannot go on before this one does


def simulate(
    stages: Sequence[SimulatedStage], *, num_microbatches: int, in_flight: int | None = None, sum_seconds: float = 0.0
) -> Simulation:
    """Simulate one step.

    Args:
        stages: all stages that exchange data with one another; the first replica alone where all replicas do the same.
        num_microbatches: of the global batch.
        in_flight: most microbatches that are sent but not yet received over an edge; ``None`` for no limit.
        sum_seconds: of the all-reduce over all ranks, and of the host's work around the step.
    """
    index = {stage.key: i for i, stage in enumerate(stages)}
    running = [_start(stage, index, num_microbatches) for stage in stages]
    for i, each in enumerate(running):
        for source, _ in each.inputs["forward"]:
            running[source].receivers.append(i)
    limit = num_microbatches if in_flight is None else in_flight
    todo = deque(range(len(stages)))
    while todo:
        i = todo.popleft()
        if _advance(i, running, limit):
            todo.extend(running[i].waiting)
            running[i].waiting.clear()
    assert all(len(each.records) == len(each.order) for each in running), "stages wait for one another"
    return Simulation(
        stages=stages,
        records=[each.records for each in running],
        reduced=[_reduced(stage, each.records) for stage, each in zip(stages, running, strict=True)],
        sum_seconds=sum_seconds,
    )


def _start(stage: SimulatedStage, index: dict[StageKey, int], num_microbatches: int) -> _Running:
    edges: dict[Direction, tuple[Edge, ...]] = {"forward": stage.activations, "backward": stage.gradients}
    return _Running(
        order=order_of_passes(stage.behind, num_microbatches),
        totals={"forward": stage.totals("forward"), "backward": stage.totals("backward")},
        inputs={way: [(index[edge.source], edge.seconds) for edge in each] for way, each in edges.items()},
    )


def _advance(i: int, running: list[_Running], limit: int) -> bool:
    """Run the passes of a stage until one of them lacks its inputs; return whether any ran."""
    me, before = running[i], len(running[i].records)
    clock = me.clock
    for place in range(before, len(me.order)):
        direction, microbatch = me.order[place]
        arrival, last = clock, -1
        for source, seconds in me.inputs[direction]:
            ends = running[source].ends[direction]
            if len(ends) <= microbatch:
                running[source].waiting.append(i)
                me.clock = clock
                return place > before
            if ends[microbatch] + seconds > arrival:
                arrival, last = ends[microbatch] + seconds, source
        if microbatch >= limit and direction == "forward":
            # The sender waits until its oldest microbatch underway has been received.
            for receiver in me.receivers:
                begins = running[receiver].begins
                if len(begins) <= microbatch - limit:
                    running[receiver].waiting.append(i)
                    me.clock = clock
                    return place > before
                if begins[microbatch - limit] > arrival:
                    arrival, last = begins[microbatch - limit], receiver
        end = arrival + me.totals[direction][microbatch]
        me.records.append((me.order[place], arrival, end, last, arrival - clock))
        if direction == "forward":
            me.begins.append(arrival)
        me.ends[direction].append(end)
        clock = end
    me.clock = clock
    return len(me.order) > before


def _reduced(stage: SimulatedStage, records: Sequence[tuple[Pass, float, float, int, float]]) -> float:
    """When the gradients are reduced: the reduction begins during the last backward pass where it overlaps it."""
    (direction, _), begin, end, _, _ = records[-1]
    assert direction == "backward", "every order ends with a backward pass"
    overlapped = begin + stage.reduce if stage.last_bucket < stage.reduce else 0.0
    return max(overlapped, end + stage.last_bucket)

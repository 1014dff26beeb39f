"""A step as all ranks recorded it: as a trace for Perfetto, and as shares of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.observe.spans import Clock, Span, SpanInfo

Event = dict[str, Any]
KINDS = {
    "forward": "forward and loss",
    "backward": "backward",
    "bridge": "bridge: wait, transfer",
    "pipeline": "pipeline: wait, transfer",
    "loading": "loading the next batch",
    "reduce": "gradient reduction",
    "optimizer": "norms, update",
    "sum": "all ranks: wait, add up",
    "other": "nothing recorded",
}
"""Kind of work -> its name for a reader, in the order of a step."""
WORKING = ("forward", "backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class TracedSpan:
    """A :class:`Span` on the common clock: ``begin`` and ``end`` in seconds since the step began anywhere."""

    info: SpanInfo
    depth: int
    microbatch: int | None
    begin: float
    end: float


@dataclass(frozen=True, kw_only=True)
class RankTrace:
    """One rank's part of a step.

    Attributes:
        rank: global rank.
        modules: what it holds.
        label: its place, such as ``tp0 dp1``.
        stage: pipeline stage.
        begin: when its step began, in seconds on the common clock.
        end: when it ended.
        spans: in the order of their begin, those inside of others after them.
    """

    rank: int
    modules: tuple[str, ...]
    label: str
    stage: int
    begin: float
    end: float
    spans: tuple[TracedSpan, ...]

    @property
    def name(self) -> str:
        return f"rank {self.rank}: {' and '.join(self.modules)}, stage {self.stage}, {self.label}"

    def seconds(self) -> dict[str, float]:
        """Kind -> seconds, those of a span inside of another counted for the inner one only; the rest is ``other``."""
        sums = dict.fromkeys(KINDS, 0.0)
        outer: list[TracedSpan] = []
        for span in self.spans:
            del outer[span.depth :]
            if outer:
                sums[outer[-1].info.kind] -= span.end - span.begin
            outer.append(span)
            sums[span.info.kind] = sums.get(span.info.kind, 0.0) + span.end - span.begin
        sums["other"] = self.end - self.begin - sum(sums.values())
        return sums


def trace_of_rank(
    rank: int, layout: MimoLayout, spans: Sequence[Span], clock: Clock, anchor: tuple[Any, float]
) -> RankTrace:
    """What one rank recorded of a step, on the common clock.

    Args:
        rank: global rank.
        layout: modules and their sizes.
        spans: in the order of their begin.
        clock: with which they were marked.
        anchor: a mark of it at the beginning of the step, and the common time of that moment.
    """
    mark, begin = anchor
    traced = tuple(
        TracedSpan(
            info=span.info,
            depth=span.depth,
            microbatch=span.microbatch,
            begin=begin + clock.seconds(mark, span.begin),
            end=begin + clock.seconds(mark, span.end),
        )
        for span in spans
    )
    modules = layout.modules_on(rank)
    places = {name: layout.modules[name].coordinates(rank) for name in modules}
    axes = [" ".join(f"{axis}{place[axis]}" for axis in ("tp", "dp")) for place in places.values()]
    same = len(set(axes)) == 1
    return RankTrace(
        rank=rank,
        modules=modules,
        label=axes[0] if same else ", ".join(f"{name} {each}" for name, each in zip(modules, axes, strict=True)),
        stage=places[modules[0]]["pp"],
        begin=begin,
        end=max((span.end for span in traced), default=begin),
        spans=traced,
    )


def chrome_trace(ranks: Sequence[RankTrace]) -> dict[str, Any]:
    """The trace in the JSON format of Chrome and Perfetto: a process for each rank, times in microseconds."""
    start = min(each.begin for each in ranks)
    events: list[Event] = []
    for each in ranks:
        events.append({"ph": "M", "name": "process_name", "pid": each.rank, "args": {"name": each.name}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": each.rank, "args": {"sort_index": each.rank}})
        events += [_slice(span, each.rank, start) for span in each.spans]
    events += _arrows(ranks, start)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def shares(ranks: Sequence[RankTrace]) -> dict[str, dict[str, float]]:
    """Module -> kind -> share of the step, from 0 to 1, mean of the module's ranks."""
    step = max(each.end for each in ranks) - min(each.begin for each in ranks)
    by_module: dict[str, list[dict[str, float]]] = {}
    for each in ranks:
        by_module.setdefault(" and ".join(each.modules), []).append(each.seconds())
    found = {}
    for module, seconds in by_module.items():
        found[module] = {kind: sum(each[kind] for each in seconds) / len(seconds) / step for kind in KINDS}
        found[module]["other"] = 1 - sum(share for kind, share in found[module].items() if kind != "other")
    return found


def idle_share(of_module: dict[str, float]) -> float:
    """The share in which nothing was computed. Transfers belong to it: waiting cannot be told apart from them."""
    return 1 - sum(of_module[kind] for kind in WORKING)


def describe_shares(ranks: Sequence[RankTrace]) -> str:
    """One line for each module."""
    lines = []
    for module, of_module in shares(ranks).items():
        parts = [
            f"{name.partition(':')[0]} {of_module[kind]:.0%}"
            for kind, name in KINDS.items()
            if kind not in WORKING and of_module[kind] >= 0.005
        ]
        lines.append(f"{module}: idle {idle_share(of_module):.0%} of the step ({', '.join(parts)})")
    return "\n".join(lines)


def _slice(span: TracedSpan, rank: int, start: float) -> Event:
    details = {"microbatch": span.microbatch, "peers": list(span.info.peers)}
    return {
        "ph": "X",
        "name": span.info.label,
        "cat": span.info.kind,
        "pid": rank,
        "tid": 0,
        "ts": (span.begin - start) * 1e6,
        "dur": (span.end - span.begin) * 1e6,
        "args": {name: value for name, value in details.items() if value not in (None, [])},
    }


def _arrows(ranks: Sequence[RankTrace], start: float) -> Iterator[Event]:
    """From every send to the receives that it ends in."""
    sent = {
        (span.info.edge, span.info.sends, span.microbatch, each.rank, peer): span
        for each in ranks
        for span in each.spans
        if span.info.sends
        for peer in span.info.peers
    }
    number = 0
    for each in ranks:
        for span in each.spans:
            direction = span.info.receives
            for peer in span.info.peers if direction else ():
                sender = sent.get((span.info.edge, direction or "", span.microbatch, peer, each.rank))
                if sender is None:
                    continue
                number += 1
                arrow = {"name": span.info.edge, "cat": "transfer", "id": number, "tid": 0}
                yield {**arrow, "ph": "s", "pid": peer, "ts": (sender.begin - start) * 1e6}
                yield {**arrow, "ph": "f", "bp": "e", "pid": each.rank, "ts": (span.end - start) * 1e6}

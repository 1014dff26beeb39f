"""Puts a recorded step beside a simulated one, module by module."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.observe.spans import SpanInfo
from lightning_mimo.observe.trace import KINDS, RankTrace, TracedSpan
from lightning_mimo.planning.report import table as aligned
from lightning_mimo.planning.simulation import Simulation
from lightning_mimo.planning.timeline import traces_of

WAITING = "waiting"
_GROUPS = {
    "forward": "forward",
    "backward": "backward",
    "bridge": WAITING,
    "pipeline": WAITING,
    "loading": "loading",
    "reduce": "reduce",
    "optimizer": "optimizer",
    "sum": WAITING,
    "other": "other",
}
"""Kind of a span -> row of the comparison. Transfers and the sum over all ranks are mostly waiting for others, and
which of them waits depends on small differences, so they are compared together."""
_NAME = re.compile(r"rank (\d+): (.+), stage (\d+), (.*)")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One row of a comparison.

    Attributes:
        module: module, or modules that share their ranks.
        what: ``forward``, ``backward``, ``waiting``, ``reduce``, ``optimizer``, ``loading`` or ``other``.
        measured: seconds of a step, as the mean over the module's ranks.
        simulated: the same in the simulation.
    """

    module: str
    what: str
    measured: float
    simulated: float

    @property
    def seconds(self) -> float:
        """Measured less simulated."""
        return self.measured - self.simulated


def read_trace(path: Path) -> list[RankTrace]:
    """Read a trace that StepTrace has written.

    Raises:
        ConfigError: if the file is none.
    """
    try:
        events = json.loads(path.read_text())["traceEvents"]
        names = {each["pid"]: each["args"]["name"] for each in events if each.get("name") == "process_name"}
        slices: dict[int, list[dict[str, Any]]] = {pid: [] for pid in names}
        for each in events:
            if each["ph"] == "X":
                slices[each["pid"]].append(each)
        ranks = [_rank(name, slices[pid]) for pid, name in sorted(names.items())]
    except OSError as error:
        raise ConfigError(f"--compare={path}: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"--compare={path} is no trace of this package: give the step=N.json that fit --trace DIR has written."
        ) from None
    if not ranks:
        raise ConfigError(f"--compare={path} holds no ranks.")
    return ranks


def _rank(name: str, slices: Sequence[Mapping[str, Any]]) -> RankTrace:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(name)
    spans: list[TracedSpan] = []
    open_ends: list[float] = []
    for each in sorted(slices, key=lambda each: (each["ts"], -each["dur"])):
        begin, end = each["ts"] / 1e6, (each["ts"] + each["dur"]) / 1e6
        while open_ends and open_ends[-1] <= begin + 1e-9:
            open_ends.pop()
        info = SpanInfo(kind=each["cat"], label=each["name"])
        microbatch = each["args"].get("microbatch")
        spans.append(TracedSpan(info=info, depth=len(open_ends), microbatch=microbatch, begin=begin, end=end))
        open_ends.append(end)
    return RankTrace(
        rank=int(match[1]),
        modules=tuple(match[2].split(" and ")),
        label=match[4],
        stage=int(match[3]),
        begin=0.0,
        end=max((span.end for span in spans), default=0.0),
        spans=tuple(spans),
    )


def check_trace(ranks: Sequence[RankTrace], layout: MimoLayout, *, path: Path) -> None:
    """Check that a trace is one of a run in a layout.

    Raises:
        ConfigError: naming the first rank that differs.
    """
    if len(ranks) != layout.world_size:
        raise ConfigError(
            f"--compare={path} is a trace of {len(ranks)} ranks, but the config has {layout.world_size}; give the "
            f"config of that run."
        )
    for each in ranks:
        if set(each.modules) != set(layout.modules_on(each.rank)):
            raise ConfigError(
                f"--compare={path}: rank {each.rank} ran {' and '.join(each.modules)}, but in the config it has "
                f"{' and '.join(layout.modules_on(each.rank))}; give the config of that run."
            )


def compare(measured: Sequence[RankTrace], simulation: Simulation) -> list[Difference]:
    """Compare the seconds of a step, by module and by what they were spent on, in the order of a step."""
    one = _means(measured, [1] * len(measured))
    two = _means(traces_of(simulation), [stage.ranks for stage in simulation.stages])
    rows = list(dict.fromkeys(_GROUPS.values()))
    return [
        Difference(module=module, what=what, measured=one[module].get(what, 0.0), simulated=two[other].get(what, 0.0))
        for module in one
        for other in [next(each for each in two if set(each.split(" and ")) == set(module.split(" and ")))]
        for what in rows
        if one[module].get(what, 0.0) or two[other].get(what, 0.0)
    ]


def _means(ranks: Sequence[RankTrace], weights: Sequence[int]) -> dict[str, dict[str, float]]:
    """Module -> row -> seconds, as the mean over its ranks."""
    sums: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    step = max(each.end for each in ranks) - min(each.begin for each in ranks)
    for each, weight in zip(ranks, weights, strict=True):
        name = " and ".join(each.modules)
        counts[name] = counts.get(name, 0) + weight
        into = sums.setdefault(name, {})
        seconds = each.seconds()
        seconds["other"] += step - (each.end - each.begin)
        for kind in KINDS:
            into[_GROUPS[kind]] = into.get(_GROUPS[kind], 0.0) + weight * seconds[kind]
    return {name: {what: value / counts[name] for what, value in each.items()} for name, each in sums.items()}


def describe_comparison(
    measured: Sequence[RankTrace], simulation: Simulation, differences: Sequence[Difference]
) -> str:
    """The comparison as a table, and the largest difference in words."""
    step = max(each.end for each in measured) - min(each.begin for each in measured)
    rows = [("module", "what", "measured ms", "simulated ms", "difference ms")]
    rows.append(("step", "", *_milliseconds(step, simulation.seconds)))
    rows += [(each.module, each.what, *_milliseconds(each.measured, each.simulated)) for each in differences]
    lines = [aligned(rows, left=(0, 1))]
    # What a module waits for follows from what the others do.
    causes = [each for each in differences if each.what != WAITING] or list(differences)
    largest = max(causes, key=_size)
    lines += ["", f"largest difference besides waiting: {_in_words(largest)}"]
    simulated = [each for each in causes if each.simulated]
    if not largest.simulated and simulated:
        lines[-1] += f"; of what the simulation has: {_in_words(max(simulated, key=_size))}"
    return "\n".join(lines)


def _size(difference: Difference) -> float:
    return abs(difference.seconds)


def _in_words(difference: Difference) -> str:
    more = "longer" if difference.seconds > 0 else "shorter"
    return f"{difference.what} of {difference.module}, {1000 * _size(difference):.1f} ms {more} than simulated"


def _milliseconds(measured: float, simulated: float) -> tuple[str, str, str]:
    return f"{1000 * measured:.1f}", f"{1000 * simulated:.1f}", f"{1000 * (measured - simulated):+.1f}"

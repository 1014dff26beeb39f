"""Timeline plot of a traced step: one row per rank, time on the horizontal axis."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_mimo.observe.trace import KINDS, RankTrace, idle_share, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Based on the colour-blind-safe palette of Okabe and Ito; pale where nothing is computed.
_COLOURS = {
    "forward": "#56b4e9",
    "backward": "#0072b2",
    "bridge": "#f0bc5e",
    "pipeline": "#f6ec8f",
    "loading": "#d55e00",
    "reduce": "#cc79a7",
    "optimizer": "#009e73",
    "sum": "#c9c9c9",
    "other": "#f4f4f4",
}
_TITLE_WIDTH = 100  # characters on a line
_GAP = 0.6  # between modules, in rows
_NARROWEST = 0.018  # fraction of the width that a span needs to show its microbatch number


def require_matplotlib() -> None:
    """Raise an error if matplotlib is not installed.

    Raises:
        ModuleNotFoundError: with the install command.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "Drawing a step needs matplotlib, which is not installed: pip install 'lightning-mimo[trace]'."
        )


def draw_timeline(ranks: Sequence[RankTrace], path: Path, *, title: str) -> None:
    """Draw the timeline of a step and save it as a PNG file.

    Args:
        ranks: traces of all ranks for one step.
        path: output file.
        title: title of the plot; a long one takes several lines.
    """
    from matplotlib.figure import Figure

    rows = _rows(ranks)
    start = min(each.begin for each in ranks)
    width = (max(each.end for each in ranks) - start) * 1000
    height = max(rows.values()) + 1
    lines = textwrap.wrap(title, _TITLE_WIDTH)
    figure = Figure(figsize=(11, 1.3 + 0.2 * len(lines) + 0.42 * height), layout="constrained")
    axes = figure.add_subplot()
    for each in ranks:
        _draw_rank(axes, each, rows[each.rank], start=start, width=width)
    _name_modules(axes, ranks, rows, width=width)
    axes.set_yticks(list(rows.values()), [f"rank {each.rank}  {_short(each)}" for each in ranks], fontsize=9)
    axes.set_ylim(height - 0.35, -0.95)
    axes.set_xlim(0, width)
    axes.set_xlabel("milliseconds")
    axes.set_title("\n".join(lines), loc="left", fontsize=11)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    seen = {span.info.kind for each in ranks for span in each.spans} | {"other"}
    handles = [axes.bar(0, 0, color=_COLOURS[kind], label=name) for kind, name in KINDS.items() if kind in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)


def _rows(ranks: Sequence[RankTrace]) -> dict[int, float]:
    """Return rank -> vertical position in the plot, with a gap between modules."""
    rows: dict[int, float] = {}
    height, before = -1.0, None
    for each in ranks:
        height += 1 if before in (None, each.modules) else 1 + _GAP
        rows[each.rank], before = height, each.modules
    return rows


def _draw_rank(axes: Axes, each: RankTrace, row: float, *, start: float, width: float) -> None:
    axes.broken_barh([(0, width)], (row - 0.4, 0.8), facecolor=_COLOURS["other"])
    for span in each.spans:
        begin, length = (span.begin - start) * 1000, (span.end - span.begin) * 1000
        colour = _COLOURS.get(span.info.kind, _COLOURS["sum"])
        axes.broken_barh([(begin, length)], (row - 0.4, 0.8), facecolor=colour, edgecolor="white", linewidth=0.4)
        if span.info.kind in ("forward", "backward") and length > _NARROWEST * width and span.info.label != "loss":
            colour = "white" if span.info.kind == "backward" else "black"
            middle = begin + length / 2
            axes.text(middle, row, str(span.microbatch), ha="center", va="center", fontsize=8, color=colour)


def _name_modules(axes: Axes, ranks: Sequence[RankTrace], rows: dict[int, float], *, width: float) -> None:
    first: dict[tuple[str, ...], int] = {}
    for each in ranks:
        first.setdefault(each.modules, each.rank)
    found = shares(ranks)
    for modules, rank in first.items():
        name = " and ".join(modules)
        words = f"{name}: idle {idle_share(found[name]):.0%} of the step"
        axes.text(0, rows[rank] - 0.48, words, ha="left", va="bottom", fontsize=9, fontweight="bold")


def _short(each: RankTrace) -> str:
    return each.label if each.stage == 0 and len(each.modules) > 1 else f"{each.label} pp{each.stage}"

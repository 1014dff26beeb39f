"""The outcome of a benchmark: a table to read, and the same as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Cell = str | int | float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """One table.

    Attributes:
        title: what was measured, in a line.
        columns: headings.
        rows: as many cells each as there are columns.
        notes: what is needed to read the table: units, targets, how noisy the machine was.
        details: raw figures, for the JSON only.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        table = [list(map(str, self.columns)), *([_in_words(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.columns))]
        is_text = [any(isinstance(row[column], str) for row in self.rows) for column in range(len(self.columns))]
        lines = [
            "  ".join(_aligned(*each) for each in zip(row, widths, is_text, strict=True)).rstrip() for row in table
        ]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join(["", self.title, "", lines[0], rule, *lines[1:], "", *self.notes])


def as_json(reports: Mapping[str, Report]) -> dict[str, Any]:
    """All reports, and on what they were measured."""
    machine = {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "lightning", "megatron-core", "lightning-mimo")},
    }
    return {"machine": machine, "benchmarks": {name: asdict(report) for name, report in reports.items()}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "run from its sources"


def _in_words(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.3f}" if abs(cell) < 100 else f"{cell:,.0f}"
    return "" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell


def _aligned(cell: str, width: int, is_text: bool) -> str:
    return cell.ljust(width) if is_text else cell.rjust(width)

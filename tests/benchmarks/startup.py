"""Seconds from the launch to the first optimizer step, in fresh processes, and of what needs no torch at all."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from tests.benchmarks.process_groups import SIZES, power_law
from tests.benchmarks.report import Report
from tests.support.rank_pool import RankPool

ROOT = Path(__file__).parents[2]
LIMIT = 0.3  # seconds
WITHOUT_TORCH = {
    "python -c pass": ["-c", "pass"],
    "import lightning_mimo": ["-c", "import lightning_mimo"],
    "lightning-mimo layout": ["-m", "lightning_mimo", "layout", "--config", "configs/digits_vlm.yaml"],
    "lightning-mimo --help": ["-m", "lightning_mimo", "--help"],
}


def launch(ranks: int) -> Mapping[str, float]:
    """What was done -> seconds until the last rank had done it, from when the last rank had done what is before."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.benchmarks.launch_once", folder, str(ranks), str(time.time())]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
        marks = [json.loads(file.read_text()) for file in Path(folder).iterdir()]
    reached = {what: max(each[what] for each in marks) for what in marks[0]}
    return {what: reached[what] - reached[before] for before, what in itertools.pairwise(reached)}


def _seconds_of(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - began


def measure(pool: RankPool, *, quick: bool) -> Report:
    launches: dict[int, list[Mapping[str, float]]] = {ranks: [] for ranks in SIZES}
    for i in range(1 if quick else 3):
        for ranks in SIZES if i % 2 == 0 else reversed(SIZES):
            launches[ranks].append(launch(ranks))
    rows = [
        (what, *(statistics.median(each[what] for each in launches[ranks]) for ranks in SIZES))
        for what in launches[SIZES[0]][0]
    ]
    totals = {ranks: [sum(each.values()) for each in launches[ranks]] for ranks in SIZES}
    rows.append(("together", *(statistics.median(totals[ranks]) for ranks in SIZES)))
    spread = ", ".join(f"{ranks} ranks {min(all_):.1f} to {max(all_):.1f}" for ranks, all_ in totals.items())
    fresh: dict[str, list[float]] = {name: [] for name in WITHOUT_TORCH}
    for _ in range(3 if quick else 11):
        for name, arguments in WITHOUT_TORCH.items():
            fresh[name].append(_seconds_of(arguments))
    after = [i for i, row in enumerate(rows) if row[0] in ("imports", "data", "together")]
    own = [sum(row[1 + i] for j, row in enumerate(rows) if j not in after) for i in range(len(SIZES))]
    return Report(
        title="From the launch to the first optimizer step: seconds, until the last rank is there",
        columns=("", *(f"{ranks} ranks" for ranks in SIZES)),
        rows=rows,
        notes=(
            f"Medians. All of it: {spread}.",
            f"From the fork to the end of the first step, seconds grow as {power_law(SIZES, own)}.",
            *(
                f"{name}: {statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"
                + ("" if name == "python -c pass" else f", at most {LIMIT} wanted")
                for name, seconds in fresh.items()
            ),
        ),
    )

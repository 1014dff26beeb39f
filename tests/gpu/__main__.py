"""Everything there is to find out on one GPU, in about seven minutes: ``python -m tests.gpu [--out DIR] [PART ...]``.

A part may be written with one of its runs: ``speed/bare``.

Writes ``gpu.json``, ``gpu.md`` and the output of all processes into the directory. A part that fails does not stop the
others.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tests.gpu.parts import Figures, Part, find_out, parts, rehearsed
from tests.gpu.report import describe_machine, to_markdown

_SHOWN = 1200  # characters of a failure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="directory for results and logs")
    parser.add_argument(
        "--rehearse", action="store_true", help="run small models on CPUs: finds errors in this program"
    )
    parser.add_argument("part", nargs="*", help="those to run; all if none is named")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        try:
            chosen = _choose(parts(Path(directory)), arguments.part)
        except ValueError as error:
            parser.error(str(error))
        if arguments.rehearse:
            chosen = {name: rehearsed(part) for name, part in chosen.items()}
        found: dict[str, Figures] = {}
        for name, figures in _find_all(chosen, Path(directory)):
            found[name] = figures
            _write(arguments.out, found, Path(directory))  # each time, in case that the next part is cut short
    return 1 if any("FAILED" in key for figures in found.values() for key in figures) else 0


def _choose(known: Mapping[str, Part], names: Sequence[str]) -> dict[str, Part]:
    """The parts that are named, all if none is.

    Raises:
        ValueError: naming what is no part or no run of one.
    """
    chosen: dict[str, Part] = {}
    for name in names or known:
        part, _, run = name.partition("/")
        if part not in known or (run and run not in known[part].runs):
            raise ValueError(f"there is no {name!r}; the parts are {', '.join(known)}")
        runs = {run: known[part].runs[run]} if run else known[part].runs
        before = chosen[part].runs if part in chosen else {}
        chosen[part] = replace(known[part], runs={**before, **runs})
    return chosen


def _find_all(chosen: Mapping[str, Part], directory: Path) -> Iterator[tuple[str, Figures]]:
    """At once what may run at once, one after the other what is timed."""
    together = {name: part for name, part in chosen.items() if part.together}
    with ThreadPoolExecutor(max_workers=max(1, len(together))) as pool:
        started = {name: pool.submit(find_out, name, part, directory) for name, part in together.items()}
        yield from ((name, _say(name, future.result())) for name, future in started.items())
    yield from (
        (name, _say(name, find_out(name, part, directory))) for name, part in chosen.items() if name not in together
    )


def _say(name: str, figures: Figures) -> Figures:
    """Print what came of a part, shortened, and hand it back."""
    lines = [f"== {name}"]
    for key, value in figures.items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        lines.append(f"{key}: {shown[-_SHOWN:]}")
    print("\n".join(lines), flush=True)
    return figures


def _write(out: Path, found: dict[str, Figures], logs: Path) -> None:
    machine = describe_machine()
    command = f"python -m tests.gpu {' '.join(found)}"
    (out / "gpu.json").write_text(json.dumps({"machine": machine, "command": command, "parts": found}, indent=1))
    (out / "gpu.md").write_text(to_markdown(machine, command, found))
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        for log in sorted(logs.glob("*.log")):
            archive.add(log, arcname=log.name)


if __name__ == "__main__":
    sys.exit(main())

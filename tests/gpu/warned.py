"""Warnings in the output of a run: those that nobody expects are a failure, as they are in the tests."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

from lightning_mimo.known_warnings import KNOWN_WARNINGS

_BEGIN = "Seed set to"  # what is said before it is said by imports
_LENGTH = 150
_EXPECTED = (
    # torch, once for sends and once for receives: communicators of two ranks are made before the first batch
    r"(\[.*\] )?An unbatched P2P op",
    # torch, of what the measurement switches on
    r"Synchronization debug mode is a prototype",
    r"called a synchronizing",
    # Python, of the workers of DataLoaders, which are forked and only load samples
    r"This process \(pid=\d+\) is multi-threaded",
    # Lightning, which advises workers for tiny data and batches for a logger
    r"The '\w+' does not have many workers",
)


def unexpected_warnings(logs: Iterable[str]) -> list[str]:
    """What was warned of after the imports, by Python or by torch's C++, and is neither expected nor ignored in tests.

    Args:
        logs: output of each process.
    """
    ignored = [re.compile(pattern) for pattern in (*_EXPECTED, *_ignored_in_tests(), *KNOWN_WARNINGS)]
    lines = (line for text in logs for line in text.partition(_BEGIN)[2].splitlines())
    said = {line[line.index("arning: ") + 8 :] for line in lines if "arning: " in line}
    found = {each for each in said if not any(pattern.match(each) for pattern in ignored)}
    return sorted({re.sub(r"pid=\d+", "pid", each)[:_LENGTH] for each in found})


def _ignored_in_tests() -> list[str]:
    """Patterns of the warnings that pyproject.toml lets pytest ignore."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    filters = project["tool"]["pytest"]["ini_options"]["filterwarnings"]
    return [each.split(":")[1] for each in filters if each.startswith("ignore:")]

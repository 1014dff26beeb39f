"""Shared by the multi-process tests: the one pool of ranks, and the table of the parity cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.multiprocess.parity.layouts import Errors
from tests.multiprocess.rank_pool import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Up to 8 ranks; see RankPool.run()."""
    pool = RankPool(8)
    yield pool
    pool.close()


class ParityTable:
    """One line for each case, printed at the end of ``pytest -m parity`` and ``pytest -m exhaustive``."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, name: str, ranks: int, found: Sequence[Errors]) -> None:
        worst = max(found, key=lambda each: each.gradient)
        figures = [max(getattr(each, what) for each in found) for what in ("loss", "norm", "gradient", "weight")]
        self.lines.append(f"{name:58} {ranks:5} {' '.join(f'{figure:9.1e}' for figure in figures)}  {worst.worst}")


_TABLE = pytest.StashKey[ParityTable]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = ParityTable()


@pytest.fixture
def parity_table(pytestconfig: pytest.Config) -> ParityTable:
    return pytestconfig.stash[_TABLE]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash[_TABLE]
    if table.lines and config.option.markexpr in ("parity", "exhaustive"):
        terminalreporter.section("largest relative difference from one plain process, float64")
        terminalreporter.line(
            f"{'case':58} ranks {'loss':>9} {'norm':>9} {'gradient':>9} {'weight':>9}  largest gradient difference in"
        )
        for line in table.lines:
            terminalreporter.line(line)

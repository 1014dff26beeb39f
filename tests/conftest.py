"""Shared by all tests: one pool of ranks for the session, and the table of the parity cases."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

_PROJECT = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml", "pyproject.toml"),
    *("configs", "docs", "examples", "lightning_mimo", "tests"),
)

if TYPE_CHECKING:
    from tests.parity.layouts import Errors
    from tests.support.rank_pool import RankPool
    from tests.support.run_host import RunHost


@pytest.fixture(autouse=True)
def seed_stays_in_its_test() -> Iterator[None]:
    """``seed_everything`` leaves its seed in the environment, from where ranks that start later would take it."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture
def clean_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with the files of the project, without logs, checkpoints and data that runs have left there."""
    folder = tmp_path_factory.mktemp("project")
    for name in _PROJECT:
        (folder / name).symlink_to(Path(name).resolve())
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Up to 8 ranks; see RankPool.run()."""
    from tests.support.rank_pool import RankPool  # here, since tests without ranks need not import it

    pool = RankPool(8)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def run_host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunHost]:
    """Starts runs in processes of their own; see RunHost.start()."""
    from tests.support.run_host import RunHost

    folder = tmp_path_factory.getbasetemp()
    # With several workers, each has its own folder in that of the session.
    host = RunHost(folder.parent if hasattr(request.config, "workerinput") else folder)
    yield host
    host.close()


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
    gc.disable()  # collecting imports everything, which leaves no garbage; looking for it takes a tenth of the time
    if hasattr(config, "workerinput"):  # the process that shares the tests out imports nothing
        importlib.import_module("tests.support.quick_imports")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.unfreeze()  # as if all of it had been looked at
    gc.enable()


@pytest.fixture
def parity_table(pytestconfig: pytest.Config) -> ParityTable:
    return pytestconfig.stash[_TABLE]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash[_TABLE]
    if config.option.markexpr not in ("parity", "exhaustive"):
        return
    if config.getoption("numprocesses", None):
        terminalreporter.line("Run without -n for the table of differences.")
    elif table.lines:
        terminalreporter.section("largest relative difference from one plain process, float64")
        terminalreporter.line(
            f"{'case':58} ranks {'loss':>9} {'norm':>9} {'gradient':>9} {'weight':>9}  largest gradient difference in"
        )
        for line in table.lines:
            terminalreporter.line(line)

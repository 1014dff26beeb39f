"""A rank that fails at the end, or leaves, or is killed there: it is named, the run's exit code says so, all end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.kill.driver import processes_of
from tests.kill.ends import RANKS, TIMEOUT
from tests.support.run_host import RunHost
from tests.support.tiers import exhaustive


@dataclass(frozen=True, kw_only=True)
class End:
    """How a run ended.

    Attributes:
        code: exit code, or minus the signal that killed the process that the user started.
        log: what was printed.
        seconds: how long it took in all.
        left: processes of the run that were still there 15 seconds later.
    """

    code: int
    log: str
    seconds: float
    left: list[psutil.Process]

    def pid_of(self, rank: int) -> int:
        (line,) = [line for line in self.log.splitlines() if line.startswith(f"rank {rank} is process ")]
        return int(line.rpartition(" ")[2])


def run(host: RunHost, folder: Path, case: str, rank: int) -> End:
    """Start a run and wait until all its processes have ended."""
    began = time.monotonic()
    process = host.start("tests.kill.ends:main", case, str(rank), log=folder / "log", shutdown=True)
    code = process.wait(timeout=300)
    seconds = time.monotonic() - began
    deadline = time.monotonic() + 15
    while (left := processes_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for each in left:
        each.kill()
    return End(code=code, log=(folder / "log").read_text(), seconds=seconds, left=left)


NAMED = {
    "raise_in_on_fit_end": ("ended with exit code 1", 1),
    "raise_in_teardown": ("ended with exit code 1", 1),
    "raise_after_fit": ("ended with exit code 1", 1),
    "exit_after_fit": ("ended with exit code 3", 3),
    "system_exit_after_fit": ("ended with exit code 3", 3),
    "exit_in_training": ("ended with exit code 3", 3),
    "exit_with_0_in_training": ("left the others in the middle of the run", 1),
    "interrupt_in_training": ("ended with exit code 1", 1),
    "kill_in_training": ("was killed by signal 9", 1),
    "kill_while_workers_load": ("was killed by signal 9", 1),
    "kill_in_teardown": ("was killed by signal 9", 1),
    "kill_after_fit": ("was killed by signal 9", 1),
    "work_after_fit": (f"was still running {TIMEOUT:g} s after the first rank had ended", 1),
    "stop_in_setup": ("hangs: it was stopped by a signal", 1),
}
"""Case -> what is said of the rank, and the exit code of the run."""
ALWAYS = {
    0: {"kill_in_teardown"},
    2: {
        *("raise_in_on_fit_end", "exit_after_fit", "exit_with_0_in_training", "kill_in_teardown"),
        *("work_after_fit", "stop_in_setup"),
    },
}
"""Rank -> cases that are always run."""


def _cases() -> Iterator[Any]:
    for case in NAMED:
        for rank, always in ALWAYS.items():
            yield (case, rank) if case in always else exhaustive(case, rank)


@pytest.mark.parametrize(("case", "rank"), list(_cases()))
def test_rank_that_ends_badly_is_named_and_the_exit_code_says_so(
    run_host: RunHost, tmp_path: Path, case: str, rank: int
) -> None:
    end = run(run_host, tmp_path, case, rank)
    said, code = NAMED[case]
    if rank == 0 and case.startswith("kill"):
        said, code = "is gone", -9  # the process that the user started: the shell says what killed it
    if rank == 0 and case == "stop_in_setup":
        code = -9  # a process that stands still can only be killed
    assert f"Rank {rank} (process {end.pid_of(rank)}) {said}" in end.log, end.log
    assert f"Rank {rank} (process {end.pid_of(rank)}) {said}" in end.log.splitlines()[-1], "the cause comes last"
    assert end.code == code, end.log
    assert end.seconds < 100, "others wait for 300 s if nobody tells them"
    assert not end.left


@pytest.mark.parametrize(
    ("case", "rank"),
    [
        exhaustive("nothing", 0),
        exhaustive("work_a_little_after_fit", 0),
        ("work_a_little_after_fit", 2),
        exhaustive("all_exit_with_0_in_training", 0),
    ],
)
def test_run_that_ends_well_has_exit_code_0_and_says_nothing(
    run_host: RunHost, tmp_path: Path, case: str, rank: int
) -> None:
    end = run(run_host, tmp_path, case, rank)
    assert end.code == 0, end.log
    assert "Rank" not in end.log
    assert end.log.count(" is done") == (0 if case.startswith("all") else RANKS)
    assert not end.left


def test_run_ends_when_the_process_that_watches_over_it_is_killed(run_host: RunHost, tmp_path: Path) -> None:
    end = run(run_host, tmp_path, "kill_supervisor", 2)
    assert end.code == 1, end.log
    assert "The supervisor of the ranks (process " in end.log
    assert not end.left


def test_rank_that_cannot_be_started_ends_the_run(run_host: RunHost, tmp_path: Path) -> None:
    end = run(run_host, tmp_path, "fork_fails", 0)
    assert end.code == 1, end.log
    assert "error: starting rank 2 of 3 on this node failed: Resource temporarily unavailable." in end.log
    assert "Traceback" not in end.log
    assert not end.left


def run_with_torchrun(case: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"]
    code = f"from tests.kill.ends import run; run({case!r}, 2)"
    command += ["--standalone", "--no-python", sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ["raise_in_on_fit_end", "exit_after_fit", "kill_in_teardown"])
def test_torchrun_names_the_rank_and_has_an_exit_code(case: str) -> None:
    done = run_with_torchrun(case)
    assert done.returncode == 1
    failures = done.stderr[done.stderr.index("Root Cause (first observed failure)") :]
    assert "rank      : 2 (local_rank: 2)" in failures


@pytest.mark.exhaustive
def test_rank_that_torchrun_started_and_that_stops_before_the_first_step_is_named() -> None:
    done = run_with_torchrun("stop_in_setup")
    assert done.returncode == 1
    assert "[Rank 0]: Ranks 2 failed to pass monitoredBarrier" in done.stderr

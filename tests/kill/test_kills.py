"""Real processes, really killed: nothing is lost, nothing hangs, and the end is the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lightning_mimo.checkpoint.directory import read_manifest
from tests.kill.driver import Kill, run_with_kills, start, wait_for_ranks
from tests.support.run_host import RunHost


def check(kills: list[Kill]) -> None:
    # Others have 10 s to say why they stopped, then they are ended.
    assert max(kill.seconds for kill in kills) < 60
    assert all(kill.told for kill in kills), "the others say which rank is missing"


def test_killed_runs_end_with_the_weights_of_one_that_was_left_alone(run_host: RunHost, tmp_path: Path) -> None:
    check(run_with_kills(run_host, tmp_path, kills=1, seed=5, steps=12))


@pytest.mark.exhaustive
@pytest.mark.parametrize("async_save", [False, True], ids=["waits", "behind"])
def test_fifty_kills(run_host: RunHost, tmp_path: Path, async_save: bool) -> None:
    kills = run_with_kills(run_host, tmp_path, kills=25, seed=2 + async_save, async_save=async_save)
    check(kills)
    assert sum(kill.in_save for kill in kills) >= 5


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.exhaustive)],
    ids=["SIGTERM", "SIGUSR1"],
)
def test_signal_saves_after_the_step_and_ends_all_ranks(
    run_host: RunHost, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(run_host, tmp_path, "--pause", "0.2")
    pids = wait_for_ranks(tmp_path, process)
    # Only one of the ranks is told, and not the first one.
    os.kill(pids[2], number)
    assert process.wait(timeout=120) == 0
    log = (tmp_path / "log").read_text()
    saved = tmp_path / "checkpoints" / "last-preempted.ckpt"
    step = read_manifest(saved)["step"]
    assert f"Ended by a signal: saved {saved} after step {step}." in log
    assert "Traceback" not in log

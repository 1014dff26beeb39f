"""A run over shards or a stream that is killed and goes on in another layout learns from every sample once."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.kill.driver import RUN_SECONDS, processes_of, start, wait_for_ranks
from tests.kill.stream_run import BATCH, LAYOUTS, SAMPLES, STEPS, write_shards
from tests.support.run_host import HostedRun, RunHost

BATCHES = -(-SAMPLES // BATCH)


def run(
    host: RunHost, folder: Path, data: str, *, layouts: Sequence[str], kills: Sequence[int], steps: int = STEPS
) -> list[list[int]]:
    """Run to the end, killed when it comes to some steps, in another layout each time.

    Returns:
        The samples of each step that the final weights have learned from, in order.
    """
    folder.mkdir()
    for attempt, layout in enumerate(layouts):
        (folder / "step").unlink(missing_ok=True)
        options = ("--data", data, "--layout", layout, "--attempt", str(attempt), "--steps", str(steps))
        process = start(host, folder, *options, function="tests.kill.stream_run:main")
        if attempt < len(kills):
            kill(folder, process, at=kills[attempt], rank=attempt + 1, ranks=LAYOUTS[layout].ranks)
        else:
            assert process.wait(timeout=RUN_SECONDS) == 0, (folder / "log").read_text()[-3000:]
    return learned(folder, steps)


def kill(folder: Path, process: HostedRun, *, at: int, rank: int, ranks: int) -> None:
    pids = wait_for_ranks(folder, process, ranks=ranks)
    assert pids, (folder / "log").read_text()[-3000:]
    while not (folder / "step").exists() or int((folder / "step").read_text() or 0) < at:
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        time.sleep(0.002)
    os.kill(pids[rank], signal.SIGKILL)
    process.wait(timeout=RUN_SECONDS)
    while processes_of(process.pid):
        time.sleep(0.02)


def learned(folder: Path, steps: int) -> list[list[int]]:
    """Of every step, what the last run that did it has learned from."""
    entries = [json.loads(line) for file in folder.glob("learned*.jsonl") for line in file.read_text().splitlines()]
    begins = {entry["attempt"]: entry["begins"] for entry in entries if "begins" in entry}
    found = []
    for step in range(1, steps + 1):
        attempt = max(each for each, begin in begins.items() if begin < step)
        here = [each["samples"] for each in entries if (each["attempt"], each.get("step")) == (attempt, step)]
        found.append(sorted(number for samples in here for number in samples))
    return found


def check_once(steps: list[list[int]]) -> None:
    """Every sample once in an epoch, none in the part of an epoch twice."""
    for first in range(0, len(steps), BATCHES):
        epoch = Counter(number for step in steps[first : first + BATCHES] for number in step)
        assert max(epoch.values()) == 1
        assert len(epoch) == (SAMPLES if first + BATCHES <= len(steps) else BATCH * (len(steps) - first))


def test_no_sample_is_lost_or_learned_twice(run_host: RunHost, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    layouts = ("one-one", "colocated")
    check_once(run(run_host, tmp_path / "killed", "tar", layouts=layouts, kills=(7,), steps=9))


@pytest.mark.exhaustive
@pytest.mark.parametrize("data", ["tar", "stream"])
def test_twice_killed_is_as_left_alone(run_host: RunHost, tmp_path: Path, data: str) -> None:
    write_shards(tmp_path / "shards")
    alone = run(run_host, tmp_path / "alone", data, layouts=("dp2-tp2",), kills=())
    killed = run(run_host, tmp_path / "killed", data, layouts=tuple(LAYOUTS)[:3], kills=(5, 10))
    check_once(alone)
    assert killed == alone and alone[:BATCHES] != alone[BATCHES : 2 * BATCHES]
    expected, found = (load_file(tmp_path / name / "final.safetensors") for name in ("alone", "killed"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12)

"""Starts a run, kills one of its processes at a random moment, and starts it again, until it has come to its end.

``python -m tests.kill.driver FOLDER --kills 50`` prints a line for each kill and whether the final weights are those of
a run that was left alone.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from lightning_mimo.checkpoint.directory import damaged_files, read_manifest
from tests.kill import STEPS
from tests.support.run_host import HostedRun, RunHost

RANKS = 4
START_SECONDS, RUN_SECONDS = 180.0, 300.0


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What came of one.

    Attributes:
        rank: of the process that was killed.
        in_save: whether a checkpoint was being written.
        step: of the checkpoint that was there afterwards; 0 for none.
        seconds: until the last process of the run had ended.
        told: whether the others named it.
    """

    rank: int
    in_save: bool
    step: int
    seconds: float
    told: bool


def start(host: RunHost, folder: Path, *arguments: str, function: str = "tests.kill.run_once:main") -> HostedRun:
    for pid in folder.glob("pid*"):
        pid.unlink()
    return host.start(function, str(folder), *arguments, log=folder / "log")


def wait_for_ranks(folder: Path, process: HostedRun, *, ranks: int = RANKS) -> dict[int, int]:
    """Processes by rank, once all train; empty if the run ended before."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        pids = {rank: folder / f"pid{rank}" for rank in range(ranks)}
        if all(file.exists() and file.read_text() for file in pids.values()):
            return {rank: int(file.read_text()) for rank, file in pids.items()}
        if process.poll() is not None:
            return {}
        time.sleep(0.005)
    raise TimeoutError(f"the run has not begun: {(folder / 'log').read_text()[-3000:]}")


def strike(folder: Path, process: HostedRun, draw: random.Random) -> Kill | None:
    """Kill a random rank at a random moment, half of the time while a checkpoint is being written."""
    pids = wait_for_ranks(folder, process)
    rank = draw.randrange(RANKS)
    time.sleep(draw.uniform(0.0, 3.0))

    def is_being_written() -> bool:
        return any((folder / "checkpoints").glob("unfinished/last.ckpt.*"))

    if draw.random() < 0.6:
        while not is_being_written() and process.poll() is None:
            pass
        time.sleep(draw.uniform(0.0, 0.05))
    if process.poll() is not None or not pids:
        return None
    in_save = is_being_written()
    if not is_running(pids[rank]):
        return None
    os.kill(pids[rank], signal.SIGKILL)
    begun = time.monotonic()
    process.wait(timeout=RUN_SECONDS)
    while processes_of(process.pid) and time.monotonic() - begun < RUN_SECONDS:
        time.sleep(0.02)
    seconds = time.monotonic() - begun
    log = (folder / "log").read_text()
    told = f"Rank {rank} (process {pids[rank]}) {'was killed by signal 9' if rank else 'is gone'}" in log
    return Kill(rank=rank, in_save=in_save, step=last_step(folder), seconds=seconds, told=told)


def is_running(pid: int) -> bool:
    """Whether a process runs; not one that has ended and was not waited for, which a signal does not reach."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_of(session: int) -> list[psutil.Process]:
    """All processes of a run, by the one that was started; not one that has ended and was not waited for."""
    found = []
    for process in psutil.process_iter():
        try:
            state, _, _, its_session, *_ = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_session) == session and state != "Z":
            found.append(process)
    return found


def last_step(folder: Path) -> int:
    """Step of the checkpoint that is there, which must be whole; 0 for none."""
    path = folder / "checkpoints" / "last.ckpt"
    if not path.exists():
        return 0
    manifest = read_manifest(path)
    assert not list(damaged_files(path, manifest, rank=0, ranks=1))
    return manifest["step"]


def run_with_kills(
    host: RunHost, folder: Path, *, kills: int, seed: int, async_save: bool = False, steps: int = STEPS
) -> list[Kill]:
    """Start, kill and start again; a run that ends in time for less kills than asked for is begun anew.

    Raises:
        AssertionError: if the final weights are not those of a run that was left alone.
    """
    arguments = ["--steps", str(steps), *(["--async-save"] if async_save else [])]
    alone = folder / "alone"
    alone.mkdir(parents=True)
    assert start(host, alone, *arguments).wait(timeout=RUN_SECONDS) == 0, (alone / "log").read_text()[-3000:]
    expected = load_file(alone / "final.safetensors")
    draw = random.Random(seed)
    done: list[Kill] = []
    while len(done) < kills:
        struck = folder / "struck"
        shutil.rmtree(struck, ignore_errors=True)
        struck.mkdir()
        while True:
            process = start(host, struck, *arguments)
            if len(done) < kills and (kill := strike(struck, process, draw)) is not None:
                done.append(kill)
                print(kill, flush=True)
                continue
            code = process.wait(timeout=RUN_SECONDS)
            assert code == 0, (struck / "log").read_text()[-3000:]
            break
        found = load_file(struck / "final.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        print(f"after {len(done)} kills: the final weights are those of a run that was left alone", flush=True)
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--async-save", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        host = RunHost(Path(folder))
        results = run_with_kills(host, given.folder, kills=given.kills, seed=given.seed, async_save=given.async_save)
        host.close()
    print(
        f"{len(results)} kills, {sum(kill.in_save for kill in results)} inside of a save, "
        f"at most {max(kill.seconds for kill in results):.1f} s until all ranks had ended, "
        f"{sum(kill.told for kill in results)} named"
    )

"""A process with the stubs of CUDA, which imports everything once and forks the ranks of every case."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.fake_cuda.cases import CASES, EXHAUSTIVE, FAULTS, Case
from tests.fake_cuda.records import RankRecord

_SECONDS = 600.0  # for all ranks of a case; eight on two busy cores have taken more than two minutes
_SECONDS_AFTER_FAILURE = 10.0


class Host:
    """Runs cases by name, all ranks at once."""

    def __init__(self, libraries: Sequence[Path]) -> None:
        """
        Args:
            libraries: the compiled stubs, to be loaded before all others.
        """
        environment = os.environ | {"LD_PRELOAD": " ".join(map(str, libraries)), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.fake_cuda.host"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._records: dict[str, list[RankRecord]] = {}

    def run(self, name: str) -> list[RankRecord]:
        """Records of all ranks of a case, which is run at the first call.

        Raises:
            RuntimeError: if a rank did not come to its end.
        """
        if name not in self._records:
            assert self._process.stdin is not None and self._process.stdout is not None
            with tempfile.TemporaryDirectory() as directory:
                print(json.dumps([name, directory]), file=self._process.stdin, flush=True)
                problem = json.loads(self._process.stdout.readline())
                files = sorted(Path(directory).glob("rank*.pickle"))
                records = [pickle.loads(file.read_bytes()) for file in files]
                errors = [record.error for record in records if record.error]
                if problem and not errors:
                    raise RuntimeError(f"{name}: {problem}")
                self._records[name] = records
        return self._records[name]

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


def find_case(name: str) -> Case:
    return (CASES | FAULTS | EXHAUSTIVE)[name]


def _import_before_forks() -> None:
    """Import what all ranks need, as on a machine with GPUs, but without a call to CUDA, after which torch would refuse
    to use it in a forked process."""
    import torch  # here, not above: whoever starts a host need not import it

    asked = {"is_available": lambda: True, "device_count": lambda: 1}
    answers = {name: getattr(torch.cuda, name) for name in asked}
    vars(torch.cuda).update(asked)
    importlib.import_module("tests.fake_cuda.rank")
    vars(torch.cuda).update(answers)


def _serve() -> None:
    for line in sys.stdin:
        name, directory = json.loads(line)
        print(json.dumps(_run_case(find_case(name), Path(directory))), flush=True)


def _run_case(case: Case, directory: Path) -> str:
    """Fork the ranks and wait for them. Returns what went wrong, or an empty string."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(case.world_size):
        pid = os.fork()
        if pid == 0:
            _be_rank(case, rank, port, directory)
        children.append(pid)
    return _wait(dict(enumerate(children)))


def _wait(running: dict[int, int]) -> str:
    """Wait for the processes of ranks, not for long once one has failed: the others may wait for it."""
    deadline = time.monotonic() + _SECONDS
    while running and time.monotonic() < deadline:
        for rank, pid in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del running[rank]
                if status:
                    deadline = min(deadline, time.monotonic() + _SECONDS_AFTER_FAILURE)
        time.sleep(0.01)
    for pid in running.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return "; ".join(f"rank {rank} did not come to its end" for rank in running)


def _be_rank(case: Case, rank: int, port: int, directory: Path) -> None:
    """Run one rank in this forked process, and end it."""
    from tests.fake_cuda.rank import run_rank

    os.dup2(2, 1)
    os.environ["FAKE_CUDA_DEVICES"] = str(case.world_size)
    failed = True
    try:
        record = run_rank(case, rank, port, directory)
        file = directory / f"rank{rank:03d}"
        file.with_suffix(".part").write_bytes(pickle.dumps(record))
        file.with_suffix(".part").rename(file.with_suffix(".pickle"))
        failed = bool(record.error)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(int(failed))


if __name__ == "__main__":
    _import_before_forks()
    _serve()

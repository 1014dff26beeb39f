"""A process with the stubs of CUDA, which imports everything once and forks the ranks of every case."""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from _pytest.config import apply_warning_filters

from tests.fake_cuda.cases import CASES, EXHAUSTIVE, FAILING, FAULTS, Case
from tests.fake_cuda.records import RankRecord

_SECONDS = 600.0  # for all ranks of a case; eight on two busy cores have taken more than two minutes
_SECONDS_AFTER_FAILURE = 60.0


class Host:
    """Runs cases by name, all ranks at once."""

    def __init__(
        self, libraries: Sequence[Path], *, shared: Path, warning_filters: Sequence[str], together: Sequence[str] = ()
    ) -> None:
        """
        Args:
            libraries: the compiled stubs, to be loaded before all others.
            shared: a folder for what has been run, of all processes of a session of tests.
            warning_filters: pytest's, which hold in the ranks, too.
            together: cases that will be wanted. They are run one after the other in the same processes, because most
                of the time of a case goes into what is done for the first time.
        """
        self._libraries, self._filters = libraries, warning_filters
        self._process: subprocess.Popen[str] | None = None
        self._shared = shared
        self._together = together
        self._records: dict[str, list[RankRecord]] = {}

    def run(self, name: str) -> list[RankRecord]:
        """Records of all ranks of a case, which is run at the first call.

        Raises:
            RuntimeError: if a rank did not come to its end.
        """
        if name not in self._records:
            with (self._shared / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
                self._records |= dict(pickle.loads(file.read_bytes()) for file in self._shared.glob("*.pickle"))
                self._run_missing(name)
        return self._records[name]

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.wait(timeout=30)
            self._process.stdout.close()

    def _run_missing(self, name: str) -> None:
        if name in self._together and name not in self._records:
            self._run([each for each in self._together if each not in self._records])
        if name not in self._records:  # it runs alone, or one before it has failed
            problem = self._run([name])
            if name not in self._records:
                raise RuntimeError(f"{name}: {problem}")

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fake_cuda.host", *self._filters],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"LD_PRELOAD": " ".join(map(str, self._libraries)), "OMP_NUM_THREADS": "1"},
            )
        return self._process

    def _run(self, names: Sequence[str]) -> str:
        """Run cases, and keep the records of those that came to their end. Returns what went wrong, or nothing."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        with tempfile.TemporaryDirectory() as directory:
            folders = [Path(directory) / str(number) for number in range(len(names))]
            for folder in folders:
                folder.mkdir()
            cases = [(name, str(folder)) for name, folder in zip(names, folders, strict=True)]
            print(json.dumps(cases), file=process.stdin, flush=True)
            problem = json.loads(process.stdout.readline())
            for name, folder in zip(names, folders, strict=True):
                records = [pickle.loads(file.read_bytes()) for file in sorted(folder.glob("rank*.pickle"))]
                if len(records) == find_case(name).world_size or any(record.error for record in records):
                    self._records[name] = records
                    file = self._shared / f"{re.sub(r'[^a-z0-9]+', '-', name)}.pickle"
                    file.write_bytes(pickle.dumps((name, records)))
        return problem


def find_case(name: str) -> Case:
    return (CASES | FAULTS | FAILING | EXHAUSTIVE)[name]


def _import_before_forks() -> None:
    """Import what all ranks need, as on a machine with GPUs, but without a call to CUDA, after which torch would refuse
    to use it in a forked process."""
    gc.disable()  # imports leave none, and looking for it takes a tenth of their time
    import torch  # here, not above: whoever starts a host need not import it

    asked = {"is_available": lambda: True, "device_count": lambda: 1}
    answers = {name: getattr(torch.cuda, name) for name in asked}
    vars(torch.cuda).update(asked)
    importlib.import_module("tests.fake_cuda.rank")
    vars(torch.cuda).update(answers)
    gc.enable()
    gc.freeze()  # ranks need not look through what the imports have left


def _serve() -> None:
    for line in sys.stdin:
        cases = [(find_case(name), Path(directory)) for name, directory in json.loads(line)]
        # First those for which CUDA is set up before its first use.
        cases.sort(key=lambda item: all(sizes.tp == 1 for sizes in item[0].modules.values()))
        print(json.dumps(_run_cases(cases)), flush=True)


def _run_cases(cases: Sequence[tuple[Case, Path]]) -> str:
    """Fork the ranks and wait for them. Returns what went wrong, or an empty string."""
    runs = [(case, directory, _free_port()) for case, directory in cases]
    devices = max(case.world_size for case, _ in cases)
    children = {}
    for rank in range(devices):
        pid = os.fork()
        if pid == 0:
            _be_rank(rank, devices, [run for run in runs if rank < run[0].world_size])
        children[rank] = pid
    return _wait(children, seconds=_SECONDS * len(cases))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(running: dict[int, int], *, seconds: float) -> str:
    """Wait for the processes of ranks, not for long once one has failed: the others may wait for it."""
    deadline = time.monotonic() + seconds
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


def _be_rank(rank: int, devices: int, runs: Sequence[tuple[Case, Path, int]]) -> None:
    """Run one rank of all cases in this forked process, up to the first that fails, and end it."""
    from tests.fake_cuda.rank import raise_what_torch_logs, run_rank

    os.dup2(2, 1)
    os.environ["FAKE_CUDA_DEVICES"] = str(devices)
    raise_what_torch_logs()
    failed = True
    try:
        for case, directory, port in runs:
            record = run_rank(case, rank, port, directory)
            file = directory / f"rank{rank:03d}"
            file.with_suffix(".part").write_bytes(pickle.dumps(record))
            file.with_suffix(".part").rename(file.with_suffix(".pickle"))
            if record.error:
                break
        else:
            failed = False
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(int(failed))


if __name__ == "__main__":
    apply_warning_filters(sys.argv[1:], ())
    _import_before_forks()
    _serve()

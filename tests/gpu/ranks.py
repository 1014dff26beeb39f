"""Starts the ranks of a run, several on one GPU if need be, and collects what each printed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.child import RESULT
from tests.gpu.run import Run

_LINES = 12  # of a log that a failure shows


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the ranks of a run ended.

    Attributes:
        results: what each rank printed; ``None`` where it did not come to it.
        codes: exit codes; ``None`` for a rank that was ended at the limit.
        logs: output of each rank.
    """

    results: list[dict[str, Any] | None]
    codes: list[int | None]
    logs: list[Path]

    def result(self) -> dict[str, Any]:
        """That of rank 0, if all ranks came to theirs.

        Raises:
            RuntimeError: with the end of the log of the first that failed.
        """
        for rank, (code, result) in enumerate(zip(self.codes, self.results, strict=True)):
            if code != 0 or result is None:
                how = "was ended at the time limit" if code is None else f"ended with exit code {code}"
                lines = self.logs[rank].read_text(errors="replace").splitlines()[-_LINES:]
                raise RuntimeError("\n".join([f"Rank {rank} {how}:", *lines]))
        return self.results[0]

    @property
    def text(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)


def run_ranks(name: str, run: Run, *, directory: Path, limit: float) -> Ended:
    """Start ``run.ranks`` processes, wait for them, and end those that take too long.

    Args:
        name: of their logs.
        run: what each is to do.
        directory: where the logs go.
        limit: seconds.
    """
    port = _free_port()
    logs = [directory / f"{name}.rank{rank}.log" for rank in range(run.ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            command = [sys.executable, "-W", "default", "-m", "tests.gpu.child", run.to_json()]
            environment = {**os.environ, **_environment(run, rank, port)}
            processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
    codes = _wait(processes, time.monotonic() + limit)
    return Ended(results=[_result(log) for log in logs], codes=codes, logs=logs)


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            codes.append(None)
    return codes


def _environment(run: Run, rank: int, port: int) -> Mapping[str, str]:
    """torchrun's variables, each rank on a node of its own, and NCCL's for ranks that share a GPU."""
    threads = {"OMP_NUM_THREADS": "1" if run.ranks > 1 else "4", "PYTHONUNBUFFERED": "1"}
    if run.ranks == 1:
        return threads
    return threads | {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(run.ranks),
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": str(rank),
        "GROUP_WORLD_SIZE": str(run.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "one-gpu",
        # NCCL refuses two ranks on one GPU of one host. With host ids of their own it takes them for several hosts.
        "NCCL_HOSTID": f"rank{rank}",
        "NCCL_NET": "Socket",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _result(log: Path) -> dict[str, Any] | None:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(RESULT)]
    return json.loads(lines[-1].removeprefix(RESULT)) if lines else None

"""Starts runs as a user would, each a process of its own, without paying for the imports every time.

A host process imports everything once and forks a run for each that is asked for.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_mimo.launch.node_rank import end_process

_PRELOADED = (
    "lightning.pytorch",
    "megatron.core",
    "lightning_mimo.commands.run",
    "lightning_mimo.strategy.strategy",
    "lightning_mimo.models.gpt",
    "examples.digits.model",
    "tests.support.evaluation",
    "tests.parity.model",
)


class HostedRun:
    """A process that a host has forked; the part of :class:`subprocess.Popen` that tests need."""

    def __init__(self, host: RunHost, pid: int) -> None:
        self._host = host
        self.pid = pid
        """Also the number of the session that all of the run's processes belong to."""
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, or minus the signal that killed it; ``None`` while it runs."""
        if self.returncode is None:
            self.returncode = self._host.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """
        Raises:
            TimeoutError: if it still runs after that many seconds.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} still runs after {timeout:g} s")
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(timeout=30)


class RunHost:
    """The process that forks runs."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "tests.support.run_host"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, function: str, *arguments: str, log: Path, shutdown: bool = False) -> HostedRun:
        """Fork a run.

        Args:
            function: ``module:name`` of what the run calls, without arguments.
            arguments: of its command line, as in ``sys.argv[1:]``.
            log: file for what it prints to both streams.
            shutdown: whether a run that succeeds ends as a script does, with the interpreter's own shutdown, which
                takes two seconds; one that fails always does.
        """
        log.touch()
        return HostedRun(self, self.ask(start=function, arguments=arguments, log=str(log), shutdown=shutdown))

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


def _serve() -> tuple[str, bool] | None:
    """Fork runs until the last request; returns what to call and how to end, in the process of a run only."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _become_run(request["arguments"], request["log"])
            return request["start"], request["shutdown"]
        print(pid, flush=True)
    return None


def _become_run(arguments: Sequence[str], log: str) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for source, streams in ((nothing, [0]), (file, [1, 2])):
        for stream in streams:
            os.dup2(source, stream)
        os.close(source)
    sys.argv[1:] = arguments


def _call(function: str) -> None:
    module, name = function.split(":")
    getattr(importlib.import_module(module), name)()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in _PRELOADED:
        importlib.import_module(each)
    if (asked := _serve()) is not None:
        called, shuts_down = asked
        _call(called)
        if not shuts_down:
            end_process(0)

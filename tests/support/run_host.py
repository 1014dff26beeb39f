"""Starts runs as a user would, each a process of its own, without paying for the imports every time.

A host process imports everything once and forks a run for each that is asked for. All processes of a session of
tests share it: the first that needs one starts it, and it ends with the last.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SOCKET = "run_host"
_PRELOADED = (
    "tests.support.quick_imports",
    "torch",
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

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: the same for all that share the process; with a short path, since it gets a socket.
        """
        address = folder / _SOCKET
        self._socket = socket.socket(socket.AF_UNIX)
        with _locked(folder):
            if not address.exists():
                _start_host(address)
            self._socket.connect(str(address))
        self._stream = self._socket.makefile("rw")

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
        print(json.dumps(request), file=self._stream, flush=True)
        return json.loads(self._stream.readline())

    def close(self) -> None:
        """Let the process end, unless others are connected to it."""
        self._socket.shutdown(socket.SHUT_WR)
        self._stream.read()  # to the end, which says that it has understood
        self._stream.close()
        self._socket.close()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let no other process begin or end a host in this folder."""
    with (folder / "run_host.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        yield


def _start_host(address: Path) -> None:
    """Start the process; it can be connected to at once, and outlives this one if others still need it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        listener.set_inheritable(True)
        command = [sys.executable, "-W", "ignore", "-m", "tests.support.run_host"]
        os.posix_spawn(
            sys.executable,
            [*command, str(listener.fileno()), str(address)],
            os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            file_actions=[(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in (0, 1)],
        )


def _serve(listener: socket.socket, address: Path) -> dict[str, Any] | None:
    """Fork runs while anyone is connected; returns what was asked for, in the process of a run only."""
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    selector.register(client, selectors.EVENT_READ, client.makefile("rw"))
                elif line := key.data.readline():
                    request = json.loads(line)
                    pid = request.get("poll") or os.fork()
                    if pid == 0:
                        for each in list(selector.get_map().values()):
                            _close(each)
                        return request
                    answer = _exit_code(pid) if "poll" in request else pid
                    print(json.dumps(answer), file=key.data, flush=True)
                else:
                    selector.unregister(key.fileobj)
                    has_ended = _ended(selector, address)
                    _close(key)
                    if has_ended:
                        return None


def _close(connection: selectors.SelectorKey) -> None:
    if connection.data is not None:
        connection.data.close()
    connection.fileobj.close()


def _exit_code(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _ended(selector: selectors.BaseSelector, address: Path) -> bool:
    """Whether nobody is connected, or about to be; then nobody can connect any more."""
    with _locked(address.parent):
        if len(selector.get_map()) > 1 or selector.select(timeout=0):
            return False
        address.unlink()
        return True


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


def _import() -> None:
    gc.disable()  # looking for garbage, of which imports leave none, takes a tenth of their time
    for each in _PRELOADED:
        importlib.import_module(each)
    importlib.import_module("torch").set_num_threads(1)
    gc.enable()
    gc.collect()  # once; a run that did it would copy the memory of all imports


def _run(asked: dict[str, Any]) -> None:
    from lightning_mimo.launch.node_rank import end_process  # here, since it imports Lightning

    _become_run(asked["arguments"], asked["log"])
    _call(asked["start"])
    if not asked["shutdown"]:
        end_process(0)


if __name__ == "__main__":
    _import()
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        forked = _serve(listening, Path(sys.argv[2]))
    if forked is None:
        os._exit(0)
    _run(forked)

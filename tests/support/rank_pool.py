"""Runs test cases in real processes: a pool of ranks, started once per session and reused by every case.

Importing torch, lightning and megatron-core costs 10 to 40 s of CPU time per process. Here one fork server
pays for it, in the background, from the moment the pool is made; the ranks are forked from it within a tenth
of a second, the first time a case asks for them and again after a failure. Forking is safe because the server
only imports: it has started no thread and has not touched CUDA.

A case is a module-level function that every rank calls with the same arguments. The first rank to fail ends
the case at once with its own traceback. The ranks of a failed case are killed, since nothing can be known
about their state.
"""

import atexit
import faulthandler
import gc
import io
import itertools
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist

from tests.support import repeated_work

_PRELOADED = [
    "tests.support.without_garbage",
    "tests.support.quick_imports",
    "torch",
    "lightning",
    "megatron.core",
    "pytest",
    "lightning_mimo.strategy.strategy",
    "lightning_mimo.models.gpt",
    "tests.support.repeated_work",
]
# Without visible GPUs the cases take the CPU path on every machine, and the imports cannot initialize CUDA,
# which would not survive the fork. The warnings of those imports are no errors, whatever pytest was told.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": ""}

# Threads of process groups that are gone for Python, but not for torch, wake up a hundred times a second: after some
# cases they leave the others little of the machine.
_CASES_PER_PROCESS = 10

# How long the pool waits for the stacks of ranks that have hit the timeout.
_STACK_WAIT = 2.0
_SHOWN_LINES, _SHOWN_COLUMNS = 40, 400

# A rank that loses its peer often reports before the peer whose error is the cause.
_CAUSE_WAIT = 2.0
_CONNECTION_LOSS = re.compile(r"connection (closed|reset|refused)|broken pipe|pair closure", re.IGNORECASE)


class RankFailure(AssertionError):  # noqa: N818  (it fails a test, as any assertion does)
    """A case failed: a rank raised, its process died, or not every rank finished in time."""


@dataclass(frozen=True)
class RankInfo:
    """What a case needs in order to initialize torch.distributed itself."""

    rank: int
    world_size: int
    rendezvous: Path

    @property
    def init_method(self) -> str:
        return f"file://{self.rendezvous}"


@dataclass(frozen=True)
class _Case:
    info: RankInfo
    init: bool
    timeout: float
    call: bytes


@dataclass(frozen=True)
class _Success:
    value: Any


@dataclass(frozen=True)
class _Failure:
    rank: int
    moment: float
    summary: str
    details: str
    is_connection_loss: bool = False


# ---- in the rank's process ----

_current_rank_info: RankInfo | None = None


def current_rank_info() -> RankInfo:
    """Rank, world size and a fresh rendezvous file of the case that is running in this process."""
    if _current_rank_info is None:
        raise RuntimeError("current_rank_info() was called outside of a case run by RankPool.run().")
    return _current_rank_info


def _serve(rank: int, pipe: connection.Connection, directory: Path) -> None:
    """The main function of a rank: runs the cases that arrive through the pipe until the pool closes it."""
    _redirect_output(directory, rank)
    faulthandler.enable()
    # Ctrl-C reaches the whole process group; the pool, not the rank, decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A rank inherits the fork server as its start method, and its DataLoaders would repeat the slow imports.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(1)
    gc.enable()
    gc.freeze()  # what was imported is no garbage, and need not be looked at again after every case
    repeated_work.leave_out()
    pipe.send_bytes(b"ready")
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        case = pickle.loads(message)
        # A timer, not a signal of the pool's: Lightning resets signal handlers at the end of a fit.
        with _file(directory, rank, "stack").open("w") as file:
            faulthandler.dump_traceback_later(case.timeout, file=file)
            report = _run_case(case)
            faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(report)
        gc.collect()  # process groups end with the last reference, and models are full of cycles


def _redirect_output(directory: Path, rank: int) -> None:
    for descriptor, kind in ((1, "stdout"), (2, "stderr")):
        with _file(directory, rank, kind).open("ab") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _end_with_parent() -> None:
    """A rank that is blocked in a collective would not notice that pytest itself was killed."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _run_case(case: _Case) -> bytes:
    global _current_rank_info
    _current_rank_info = case.info
    try:
        # Lightning, for one, leaves variables such as MASTER_ADDR behind.
        with mock.patch.dict(os.environ), _process_group(case):
            fn, args, kwargs = pickle.loads(case.call)
            return _to_bytes(_Success(fn(*args, **kwargs)))
    except BaseException as error:  # also SystemExit and pytest.fail()
        return _to_bytes(_failure_from(error, case.info.rank))
    finally:
        _current_rank_info = None


@contextmanager
def _process_group(case: _Case) -> Iterator[None]:
    info = case.info
    if case.init:
        dist.init_process_group("gloo", init_method=info.init_method, rank=info.rank, world_size=info.world_size)
    yield
    # Only after success: a failed rank has to report at once, and is killed anyway.
    if dist.is_initialized():
        # A rank that closes its connections early looks like a failure to those still in a collective.
        dist.barrier()
        dist.destroy_process_group()


def _failure_from(error: BaseException, rank: int) -> _Failure:
    return _Failure(
        rank=rank,
        moment=time.monotonic(),
        summary=f"{type(error).__name__}: {error}".splitlines()[0],
        details="".join(traceback.format_exception(error)),
        is_connection_loss=isinstance(error, ConnectionError) or bool(_CONNECTION_LOSS.search(str(error))),
    )


class _PlainTensorPickler(pickle.Pickler):
    """Sends tensors by value, detached and on the CPU, as bytes.

    Shared memory would not outlive the rank, and torch's own way takes most of a millisecond for each tensor.
    """

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        plain = obj.detach().cpu().contiguous()
        return _tensor_from_bytes, (plain.reshape(-1).view(torch.uint8).numpy().tobytes(), plain.dtype, plain.shape)


def _tensor_from_bytes(data: bytes, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _to_bytes(message: Any) -> bytes:
    file = io.BytesIO()
    _PlainTensorPickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(message)
    return file.getvalue()


# ---- in pytest's process ----


@contextmanager
def _server_environment() -> Iterator[None]:
    """For every call that may start the fork server: it inherits these, and so do the ranks."""
    with mock.patch.dict(os.environ, _ENVIRONMENT), mock.patch.object(sys, "warnoptions", []):
        yield


class _Worker:
    """One rank's process, seen from the pool."""

    def __init__(self, rank: int, directory: Path) -> None:
        self.rank = rank
        self.cases = 0
        self._stderr = _file(directory, rank, "stderr")
        self._stderr_start = 0
        self._stack = _file(directory, rank, "stack")
        context = multiprocessing.get_context("forkserver")
        self.pipe, far_end = context.Pipe()
        # Not a daemon: those may not have children, which a DataLoader with workers needs.
        self.process = context.Process(target=_serve, args=(rank, far_end, directory), name=f"rank{rank}")
        with _server_environment():
            self.process.start()
        far_end.close()

    def wait_until_ready(self) -> None:
        """Called once, so that several can start at the same time."""
        self.pipe.recv_bytes()

    @property
    def is_fresh(self) -> bool:
        """Whether it can take another case."""
        return self.process.is_alive() and self.cases < _CASES_PER_PROCESS

    def begin(self, case: _Case) -> None:
        self.cases += 1
        self._stderr_start = self._stderr.stat().st_size
        self.pipe.send_bytes(pickle.dumps(case))

    def take_report(self) -> _Success | _Failure:
        """To be called when the pipe is readable or the process has ended."""
        try:
            message = self.pipe.recv_bytes() if self.pipe.poll() else None
        except (EOFError, OSError):  # OSError: it died in the middle of a report
            message = None
        return pickle.loads(message) if message is not None else self._death()

    def _death(self) -> _Failure:
        self.process.join(timeout=5.0)
        code = self.process.exitcode
        summary = f"its process ended with exit code {code}"
        if code is not None and code < 0:
            summary += f", killed by {signal.Signals(-code).name}"
        return _Failure(self.rank, time.monotonic(), summary, details=f"{summary}\n")

    @property
    def stack(self) -> str:
        """Where the main thread was when the timeout had passed, innermost frame first."""
        return self._stack.read_text().split("\n\n")[-1]

    @property
    def stderr_tail(self) -> str:
        """The end of what the rank has written to stderr during this case."""
        text = self._stderr.read_bytes()[self._stderr_start :].decode(errors="replace")
        return "\n".join([line[:_SHOWN_COLUMNS] for line in text.splitlines()[-_SHOWN_LINES:]])

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


class RankPool:
    """Up to `size` ranks on this machine, started when first needed and kept from case to case for a while."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._directory = tempfile.TemporaryDirectory(prefix="rank_pool_")
        self._workers: dict[int, _Worker] = {}
        self._case_numbers = itertools.count()
        atexit.register(self.close)
        multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
        with _server_environment():
            forkserver.ensure_running()

    def run[T](
        self,
        fn: Callable[..., T],
        *args: Any,
        world_size: int,
        timeout: float = 120.0,
        init: bool = True,
        **kwargs: Any,
    ) -> list[T]:
        """Calls `fn(*args, **kwargs)` in ranks 0 to world_size - 1 and returns their results in that order.

        With `init`, torch.distributed is initialized with gloo before the call; without it, the case does so
        itself, from `current_rank_info()`. In both cases every process group is destroyed afterwards. Ranks
        see the environment variables that were set when the pool was made.

        Raises:
            RankFailure: as soon as a rank raises or its process dies, or when `timeout` seconds have passed.
        """
        __tracebackhide__ = True
        if not 1 <= world_size <= self.size:
            raise ValueError(f"RankPool.run(world_size={world_size}): this pool has 1 to {self.size} ranks.")
        call = _to_bytes((fn, args, kwargs))
        workers = self._live_workers(world_size)
        rendezvous = Path(self._directory.name, f"rendezvous{next(self._case_numbers)}")
        try:
            for worker in workers:
                worker.begin(_Case(RankInfo(worker.rank, world_size, rendezvous), init, timeout, call))
            reports = _collect(workers, timeout)
            values = [report.value for report in reports.values() if isinstance(report, _Success)]
            if len(values) < world_size:
                name = f"{fn.__module__}.{fn.__qualname__}"
                raise RankFailure(_failure_message(name, workers, reports, timeout))
        except BaseException:
            self._kill(range(world_size))
            raise
        return values

    def close(self) -> None:
        """Ends all processes of this pool; may be called more than once."""
        atexit.unregister(self.close)
        self._kill(list(self._workers))
        self._directory.cleanup()

    def _live_workers(self, number: int) -> list[_Worker]:
        used = [rank for rank in range(number) if (worker := self._workers.get(rank)) and not worker.is_fresh]
        self._kill(used)
        started = [rank for rank in range(number) if rank not in self._workers]
        try:
            for rank in started:
                self._workers[rank] = _Worker(rank, Path(self._directory.name))
            for rank in started:
                self._workers[rank].wait_until_ready()
        except BaseException:
            self._kill(started)
            raise
        return [self._workers[rank] for rank in range(number)]

    def _kill(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            if worker := self._workers.pop(rank, None):
                worker.kill()


def _collect(workers: list[_Worker], timeout: float) -> dict[int, _Success | _Failure]:
    """The reports in the order of the ranks; a rank that is missing had not finished when the case ended."""
    reports: dict[int, _Success | _Failure] = {}
    deadline = time.monotonic() + timeout
    while len(reports) < len(workers) and (seconds_left := deadline - time.monotonic()) > 0:
        pending = [worker for worker in workers if worker.rank not in reports]
        signs = {sign: worker for worker in pending for sign in (worker.pipe, worker.process.sentinel)}
        for worker in {signs[sign] for sign in connection.wait(list(signs), seconds_left)}:
            reports[worker.rank] = worker.take_report()
        failures = [report for report in reports.values() if isinstance(report, _Failure)]
        if not all(failure.is_connection_loss for failure in failures):
            break
        deadline = min([deadline, *(failure.moment + _CAUSE_WAIT for failure in failures)])
    return dict(sorted(reports.items()))


def _failure_message(name: str, workers: list[_Worker], reports: dict[int, _Success | _Failure], timeout: float) -> str:
    failures = [report for report in reports.values() if isinstance(report, _Failure)]
    pending = [worker for worker in workers if worker.rank not in reports]
    if not failures:
        return _timeout_message(name, pending, timeout)
    first, *others = sorted(failures, key=lambda failure: (failure.is_connection_loss, failure.moment))
    parts = [f"rank {first.rank} of {len(workers)} failed in {name}:\n\n{first.details}"]
    parts += [f"rank {other.rank} failed too: {other.summary}" for other in others]
    if pending:
        parts.append(f"had not finished and got killed: {_names(pending)}")
    if stderr := workers[first.rank].stderr_tail:
        parts.append(f"\nthe end of stderr of rank {first.rank}:\n{stderr}")
    return "\n".join(parts)


def _timeout_message(name: str, pending: list[_Worker], timeout: float) -> str:
    parts = [f"{_names(pending)} had not finished {name} after {timeout:g} s"]
    for worker, stack in zip(pending, _stacks(pending), strict=True):
        lines = stack.splitlines()[:_SHOWN_LINES] or ["unknown"]
        parts.append("\n".join([f"\nrank {worker.rank} was here:", *lines]))
    return "\n".join(parts)


def _stacks(workers: list[_Worker]) -> list[str]:
    deadline = time.monotonic() + _STACK_WAIT
    while True:
        stacks = [worker.stack for worker in workers]
        # The outer end of every rank's stack is _serve: what lacks it is still being written.
        if all(" in _serve\n" in stack for stack in stacks) or time.monotonic() > deadline:
            return stacks
        time.sleep(0.05)


def _names(workers: list[_Worker]) -> str:
    return ", ".join(f"rank {worker.rank}" for worker in workers)


# ---- on both sides ----


def _file(directory: Path, rank: int, kind: Literal["stdout", "stderr", "stack"]) -> Path:
    return directory / f"rank{rank}.{kind}"

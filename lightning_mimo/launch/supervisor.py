"""Supervises the ranks of one node: names the rank that failed first, and ends the others.

It runs in a separate process that does not train, so no rank can block it. It detects the end of any rank at any time,
also after training, and also of the first rank, which the user started.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import psutil

from lightning_mimo.launch.rank_board import NodeBoard

POLL_SECONDS = 0.1
# Time that the other ranks get to report errors of their own; the short one if only the failed rank knows the cause.
_GRACE_SECONDS = 10.0
_SHORT_GRACE_SECONDS = 1.0
# The end of a killed rank may be seen after that of ranks which ended because of it.
_SETTLE_SECONDS = 0.3
# How long before it was seen a rank may have been killed, so that it counts as the cause of other failures.
_KILLED_BEFORE_SECONDS = 2.0
# Time that the first rank gets to exit by itself, because only then it returns an exit code.
_FIRST_RANK_SECONDS = 3.0
_LEFT = "left the others in the middle of the run"
_USAGE = 2
"""Exit code of a process that has printed a one-line error which the user can fix."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """Why a run ends.

    Attributes:
        rank: rank on this node.
        how: how it failed, such as ``was killed by signal 9``.
        cause: text of the exception, if there was one.
        code: exit code of the run.
        grace: seconds that other ranks get to report errors of their own.
        is_printed: whether the failure has been printed already.
    """

    rank: int
    how: str
    code: int
    cause: str = ""
    grace: float = _GRACE_SECONDS
    is_printed: bool = False


class Supervisor:
    """Supervises the ranks of a node. It is a child of the first rank and the parent of all others."""

    def __init__(
        self, board: NodeBoard, *, children: dict[int, int], first_process: int, first_rank: int, timeout: float
    ) -> None:
        """
        Args:
            board: reports of the ranks.
            children: process id -> rank on this node, for all ranks except the first.
            first_process: process id of the first rank, the parent of this process.
            first_rank: global rank of the first rank.
            timeout: seconds that a rank may keep running after the first one has ended, or may be stopped by a signal.
        """
        self._board = board
        self._alive = dict(children)
        self._first_process = first_process
        self._first_rank = first_rank
        self._timeout = timeout
        # The watchdogs of ranks that wait for a stopped rank report more details, so they come first.
        self._stopped_limit = timeout + min(30.0, timeout + 10.0)
        self._ended: dict[int, int] = {}  # rank on this node -> exit code, or minus the signal
        self._ended_at: dict[int, float] = {}
        self._first_is_gone = False
        self._stopped: dict[int, float] = {}  # rank on this node -> seconds
        self._stopped_looked_at = time.monotonic()
        self._reminded = False

    def run(self) -> None:
        """Supervise until all ranks have ended. Then the verdict is on the board."""
        _ignore_signals()
        while True:
            self._look()
            if self._board.explained:
                return self._end_all(_Failure(rank=0, how="", code=1, grace=0.0, is_printed=True))
            failure = self._failed() or self._left_others() or self._works_on() or self._stands_still()
            if failure is not None:
                return self._end_all(failure)
            if not self._alive and self._first_has_left:
                return self._board.conclude(0)
            time.sleep(POLL_SECONDS)

    # -------------------------------------------------------------- observing

    @property
    def _first_has_left(self) -> bool:
        return self._first_is_gone or self._board.ranks[0].leaving

    def _look(self) -> None:
        """Reap the children that have ended, and check whether the first rank is alive."""
        now = time.monotonic()
        for child, rank in tuple(self._alive.items()):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                del self._alive[child]
                self._ended[rank] = os.waitstatus_to_exitcode(status)
                self._ended_at[rank] = now
        self._first_is_gone = os.getppid() != self._first_process
        if self._first_has_left:
            self._ended_at.setdefault(0, now)

    def _failed(self) -> _Failure | None:
        """Return the failure of a rank that ended with an error; of the first one, if several did."""
        if not self._errors():
            return None
        time.sleep(_SETTLE_SECONDS)
        self._look()
        errors = self._errors()
        noted = {rank: slot.failed_at for rank, slot in enumerate(self._board.ranks) if slot.failed_at}
        rank = min(errors | noted, key=lambda each: min(times[each] for times in (errors, noted) if each in times))
        slot = self._board.ranks[rank]
        cause = slot.error.decode(errors="replace") if rank in noted else ""
        code = self._ended.get(rank, slot.code)
        in_one_line = code == _USAGE and bool(cause) and not cause.startswith(SystemExit.__name__)
        return _Failure(
            rank=rank,
            how=self._how(rank, code),
            cause=cause,
            code=code if code > 0 else 1,
            grace=_grace(in_one_line or (rank == 0 and slot.leaving)),
            is_printed=in_one_line,
        )

    def _errors(self) -> dict[int, float]:
        """Rank on this node -> time at which it ended with an error, or disappeared."""
        found = {}
        for rank, code in self._ended.items():
            if code != 0:
                # An abort may be the reaction of a library to a lost connection.
                by_signal = code < 0 and code != -signal.SIGABRT
                found[rank] = self._ended_at[rank] - (_KILLED_BEFORE_SECONDS if by_signal else 0.0)
        first = self._board.ranks[0]
        if self._first_is_gone:  # although it waits for a verdict, which does not exist yet
            found[0] = self._ended_at[0] - _KILLED_BEFORE_SECONDS
        elif first.leaving and first.code != 0:
            found[0] = self._ended_at[0]
        return found

    def _how(self, rank: int, code: int) -> str:
        if rank == 0 and self._first_is_gone:
            return "is gone"
        if rank not in self._ended and not self._board.ranks[rank].leaving:
            return "failed"
        if code == 0:
            return _LEFT
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _left_others(self) -> _Failure | None:
        """Return the failure of a rank that left a run with exit code 0, by ``sys.exit()``, while others continue."""
        slots = self._board.ranks
        left = [rank for rank in self._ended_at if slots[rank].failed_at]
        here = [*self._alive.values(), *(() if self._first_has_left else (0,))]
        if not left or all(slots[rank].failed_at for rank in here):
            return None
        rank = min(left, key=lambda each: slots[each].failed_at)
        if time.monotonic() - self._ended_at[rank] < _SHORT_GRACE_SECONDS:
            return None
        error = slots[rank].error.decode(errors="replace")
        return _Failure(rank=rank, how=_LEFT, cause=error, code=1, grace=_grace(rank == 0))

    def _works_on(self) -> _Failure | None:
        """Return the failure of a rank that still runs longer than the timeout after the first one ended normally."""
        if not self._ended_at:
            return None
        since = time.monotonic() - min(self._ended_at.values())
        here = [*self._alive.values(), *(() if self._first_has_left else (0,))]
        if not here or since < min(60.0, self._timeout / 2):
            return None
        if since >= self._timeout:
            how = (
                f"was still running {self._timeout:g} s after the first rank had ended, longer than "
                f"Monitoring(timeout=...) allows"
            )
            return _Failure(rank=min(here), how=how, code=1, grace=0.0)
        if not self._reminded:
            self._reminded = True
            _print_line(
                f"{self._name(min(here))} is still running {since:.0f} s after the first rank ended; waiting for it."
            )
        return None

    def _stands_still(self) -> _Failure | None:
        """Return the failure of a rank that was stopped (SIGSTOP) longer than the timeout while others were not."""
        now = time.monotonic()
        passed = now - self._stopped_looked_at
        if passed < 10 * POLL_SECONDS:
            return None
        self._stopped_looked_at = now
        stopped = [rank for pid, rank in self._processes().items() if _is_stopped(pid)]
        if len(stopped) == len(self._processes()):
            return None  # the entire run was paused
        # If this process was stopped too, the elapsed time is meaningless.
        passed = min(passed, 20 * POLL_SECONDS)
        self._stopped = {rank: self._stopped.get(rank, 0.0) + passed for rank in stopped}
        for rank, seconds in self._stopped.items():
            if seconds >= self._stopped_limit:
                how = f"hangs: it was stopped by a signal {seconds:.0f} s ago"
                return _Failure(rank=rank, how=how, code=1, grace=0.0)
        return None

    def _processes(self) -> dict[int, int]:
        """Process id -> rank on this node, for all ranks that have not ended."""
        return {**({} if self._first_has_left else {self._first_process: 0}), **self._alive}

    # ----------------------------------------------------------------- ending

    def _end_all(self, failure: _Failure) -> None:
        """Print which rank failed, let the others report their errors, end them, and set the verdict."""
        others = bool(set(self._processes().values()) - {failure.rank})
        line = f"{self._name(failure.rank)} {failure.how}{f' ({failure.cause})' if failure.cause else ''}"
        if not failure.is_printed:
            _print_line(f"{line}{'; ending the others.' if others else '.'}")
        deadline = time.monotonic() + failure.grace
        while self._processes() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self._look()
        for child in self._alive:
            os.kill(child, signal.SIGKILL)
        for child in self._alive:
            os.waitpid(child, 0)
        self._alive.clear()
        self._wait_for_first_rank(_SHORT_GRACE_SECONDS)  # its own error about a lost connection
        if others and not failure.is_printed:
            _print_line(f"First failure: {line}.")  # again, below the messages of other ranks about lost connections
        self._board.conclude(failure.code)
        self._wait_for_first_rank(_FIRST_RANK_SECONDS)
        if not self._first_has_left:
            os.kill(self._first_process, signal.SIGKILL)

    def _wait_for_first_rank(self, seconds: float) -> None:
        """Wait until the first rank has left; it exits when it sees the verdict."""
        deadline = time.monotonic() + seconds
        while not self._first_has_left and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self._look()

    def _name(self, rank: int) -> str:
        return f"Rank {self._first_rank + rank} (process {self._board.ranks[rank].pid})"


def _grace(only_it_knows: bool) -> float:
    """Seconds that other ranks get to report errors of their own.

    The first rank keeps its connections open while it waits for the verdict, so others do not notice its failure.
    """
    return _SHORT_GRACE_SECONDS if only_it_knows else _GRACE_SECONDS


def _ignore_signals() -> None:
    """Ignore signals that are sent to all processes of a run: they are for the ranks, and this process ends last."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, signal.SIG_IGN)


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _print_line(line: str) -> None:
    # One call, so that the lines of several processes do not mix.
    os.write(2, f"{line}\n".encode())

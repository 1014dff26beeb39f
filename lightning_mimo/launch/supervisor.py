"""Watches over the ranks of one node, names the one that failed first, and ends the others.

In a process of its own, which trains nothing: it sees ranks end whatever they are doing, also after training, and also
the first one, which the user started. Nothing that happens in a rank keeps it from looking.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import psutil

from lightning_mimo.launch.rank_board import NodeBoard

POLL_SECONDS = 0.1
# How long the others may take to report errors of their own, and how long if only this one can know the cause.
_GRACE_SECONDS = 10.0
_SHORT_GRACE_SECONDS = 1.0
# One that was killed may be seen to have ended after those that ended because of it.
_SETTLE_SECONDS = 0.3
# How much earlier than it was seen a rank may have been killed that makes others fail.
_KILLED_BEFORE_SECONDS = 2.0
# How long the first rank may take to end itself, as only it can leave with an exit code.
_FIRST_RANK_SECONDS = 3.0
_LEFT = "left the others in the middle of the run"
_USAGE = 2
"""Exit code of a process that has said in one line what the user can mend."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """Why a run ends.

    Attributes:
        rank: on this node.
        how: ``was killed by signal 9``.
        cause: the exception's text, if there was one.
        code: exit code for the run.
        grace: seconds that others get to report errors of their own.
        told: whether it has been said.
    """

    rank: int
    how: str
    code: int
    cause: str = ""
    grace: float = _GRACE_SECONDS
    told: bool = False


class Supervisor:
    """The parent of all ranks of a node but the first, and a child of that one."""

    def __init__(
        self, board: NodeBoard, *, children: dict[int, int], first_process: int, first_rank: int, timeout: float
    ) -> None:
        """
        Args:
            board: what ranks tell.
            children: process -> rank on this node, of all but the first.
            first_process: the first rank's, which is the parent of this one.
            first_rank: its global rank.
            timeout: seconds that a rank may work on after the first one has ended, or stand still.
        """
        self._board = board
        self._alive = dict(children)
        self._first_process = first_process
        self._first_rank = first_rank
        self._timeout = timeout
        # The watchdogs of ranks that wait for one that stands still say more than can be said here.
        self._stopped_limit = timeout + min(30.0, timeout + 10.0)
        self._ended: dict[int, int] = {}  # rank on this node -> exit code, or minus the signal
        self._ended_at: dict[int, float] = {}
        self._first_is_gone = False
        self._stopped: dict[int, float] = {}  # rank on this node -> seconds
        self._stopped_looked_at = time.monotonic()
        self._reminded = False

    def run(self) -> None:
        """Until all have ended; then the board has the verdict."""
        _ignore_signals()
        while True:
            self._look()
            if self._board.explained:
                return self._end_all(_Failure(rank=0, how="", code=1, grace=0.0, told=True))
            failure = self._failed() or self._left_others() or self._works_on() or self._stands_still()
            if failure is not None:
                return self._end_all(failure)
            if not self._alive and self._first_has_left:
                return self._board.conclude(0)
            time.sleep(POLL_SECONDS)

    # ---------------------------------------------------------------- looking

    @property
    def _first_has_left(self) -> bool:
        return self._first_is_gone or self._board.ranks[0].leaving

    def _look(self) -> None:
        """Take leave of the children that have ended, and see whether the first rank is there."""
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
        """Whether a rank has ended with an error; the one that failed first, if several have."""
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
            told=in_one_line,
        )

    def _errors(self) -> dict[int, float]:
        """Ranks that have ended with an error -> when, or what comes to the same."""
        found = {}
        for rank, code in self._ended.items():
            if code != 0:
                # An abort may be a library's answer to a lost connection.
                by_signal = code < 0 and code != -signal.SIGABRT
                found[rank] = self._ended_at[rank] - (_KILLED_BEFORE_SECONDS if by_signal else 0.0)
        first = self._board.ranks[0]
        if self._first_is_gone:  # before there was a verdict, for which it waits
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
        """Whether a rank has left a run of the Trainer with exit code 0, by ``sys.exit()``, while others go on."""
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
        """Whether a rank has gone on for longer than the timeout after the first one ended well."""
        if not self._ended_at:
            return None
        since = time.monotonic() - min(self._ended_at.values())
        here = [*self._alive.values(), *(() if self._first_has_left else (0,))]
        if not here or since < min(60.0, self._timeout / 2):
            return None
        if since >= self._timeout:
            how = (
                f"was still running {self._timeout:g} s after the first rank had ended, longer than "
                f"MimoStrategy(timeout=...) allows"
            )
            return _Failure(rank=min(here), how=how, code=1, grace=0.0)
        if not self._reminded:
            self._reminded = True
            _say(f"{self._name(min(here))} goes on {since:.0f} s after the first rank has ended; waiting for it.")
        return None

    def _stands_still(self) -> _Failure | None:
        """Whether a rank has been stopped (SIGSTOP) for longer than the timeout while others were not."""
        now = time.monotonic()
        passed = now - self._stopped_looked_at
        if passed < 10 * POLL_SECONDS:
            return None
        self._stopped_looked_at = now
        stopped = [rank for pid, rank in self._processes().items() if _is_stopped(pid)]
        if len(stopped) == len(self._processes()):
            return None  # somebody has paused the run
        # If this process was stopped itself, the time that passed means nothing.
        passed = min(passed, 20 * POLL_SECONDS)
        self._stopped = {rank: self._stopped.get(rank, 0.0) + passed for rank in stopped}
        for rank, seconds in self._stopped.items():
            if seconds >= self._stopped_limit:
                how = f"stands still: it was stopped by a signal {seconds:.0f} s ago"
                return _Failure(rank=rank, how=how, code=1, grace=0.0)
        return None

    def _processes(self) -> dict[int, int]:
        """Process -> rank, of the ranks that are there."""
        return {**({} if self._first_has_left else {self._first_process: 0}), **self._alive}

    # ----------------------------------------------------------------- ending

    def _end_all(self, failure: _Failure) -> None:
        """Say who failed, let the others report, end them, and leave the verdict."""
        others = bool(set(self._processes().values()) - {failure.rank})
        line = f"{self._name(failure.rank)} {failure.how}{f' ({failure.cause})' if failure.cause else ''}"
        if not failure.told:
            _say(f"{line}{'; ending the others.' if others else '.'}")
        deadline = time.monotonic() + failure.grace
        while self._processes() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self._look()
        for child in self._alive:
            os.kill(child, signal.SIGKILL)
        for child in self._alive:
            os.waitpid(child, 0)
        self._alive.clear()
        if others and failure.grace and not failure.told:
            _say(f"First failure: {line}.")  # once more, below what others had to say about lost connections
        self._board.conclude(failure.code)
        self._end_first_rank()

    def _end_first_rank(self) -> None:
        """It ends itself when it sees the verdict, unless it stands still."""
        deadline = time.monotonic() + _FIRST_RANK_SECONDS
        while not self._first_has_left and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self._look()
        if not self._first_has_left:
            os.kill(self._first_process, signal.SIGKILL)

    def _name(self, rank: int) -> str:
        return f"Rank {self._first_rank + rank} (process {self._board.ranks[rank].pid})"


def _grace(only_it_knows: bool) -> float:
    """Seconds that others get to report errors of their own.

    The first rank keeps its connections while it waits for the verdict, so others do not learn that it has failed.
    """
    return _SHORT_GRACE_SECONDS if only_it_knows else _GRACE_SECONDS


def _ignore_signals() -> None:
    """What is sent to all processes of a run is meant for the ranks; this process ends when they have."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, signal.SIG_IGN)


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _say(line: str) -> None:
    # One call, so that the lines of several processes do not mix.
    os.write(2, f"{line}\n".encode())

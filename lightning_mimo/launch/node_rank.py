"""This process as a forked rank of its node: how it reports to the supervisor, and how it exits."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_mimo.launch.exit_code import ExitCode, code_of
from lightning_mimo.launch.rank_board import NodeBoard

_POLL_SECONDS = 0.1

# Kept per process, not per Trainer: a second Trainer in the same process is the same forked rank.
_this: NodeRank | None = None


def this_node_rank() -> NodeRank | None:
    """Return this process as a rank, or ``None`` if no ranks were forked."""
    return _this


def end_process(code: int) -> NoReturn:
    """Run the exit handlers and end with this exit code.

    The cleanup of the interpreter is left out: in a process that was forked after the imports it copies the memory of
    all of them, which takes two to three seconds.
    """
    atexit._run_exitfuncs()
    _flush()
    os._exit(code)


class NodeRank:
    """A rank of a node whose ranks were forked. The first rank is the process that the user started."""

    def __init__(self, board: NodeBoard, *, local_rank: int, supervisor: int) -> None:
        """
        Args:
            board: shared memory through which the rank reports to the supervisor.
            local_rank: rank on this node.
            supervisor: process id of the supervisor, a child of the first rank and the parent of all other ranks.
        """
        self._board = board
        self._slot = board.ranks[local_rank]
        self._supervisor = supervisor
        self._exit_code = ExitCode()
        self._verdict = threading.Event()

    @classmethod
    def become(cls, board: NodeBoard, *, local_rank: int, supervisor: int) -> None:
        """Make this process the given rank. Arguments as for the constructor."""
        global _this
        _this = rank = cls(board, local_rank=local_rank, supervisor=supervisor)
        watch, leave = (rank._await_verdict, rank._leave_last) if local_rank == 0 else (rank._end_alone, rank._leave)
        threading.Thread(target=watch, daemon=True, name="lightning-mimo-supervised").start()
        atexit.register(leave)

    @contextlib.contextmanager
    def inside_run(self) -> Iterator[None]:
        """Enclose work that all ranks do together. An exception that leaves it is reported to the supervisor."""
        self._slot.forget()
        self._exit_code.watch(False)
        try:
            yield
        except SIGTERMException:  # raised on all ranks together
            raise
        except BaseException as error:
            self._slot.fail(error, code_of(error))
            raise
        finally:
            self._exit_code.watch(True)

    def signal_others(self, signum: signal.Signals | int) -> None:
        """Send a signal to all other ranks of this node."""
        for slot in self._board.ranks:
            if slot.pid not in (0, os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(slot.pid, signum)

    def end_node(self) -> None:
        """Kill all ranks of this node. The cause must have been printed before."""
        self._board.explain()

    # ------------------------------------------------------- the first rank

    def _await_verdict(self) -> None:
        """Thread of the first rank: exit when the supervisor has ended the others."""
        while (verdict := self._board.verdict) is None:
            if _has_ended(self._supervisor) and self._board.verdict is None:
                line = f"The supervisor of the ranks (process {self._supervisor}) has ended; ending all ranks.\n"
                os.write(2, line.encode())
                os._exit(1)
            time.sleep(_POLL_SECONDS)
        self._verdict.set()
        if verdict != 0 and not self._slot.leaving:
            os._exit(verdict)

    def _leave_last(self) -> None:
        """Exit handler of the first rank: wait for the other ranks, whose failure must change the exit code."""
        self._tell_exit_code()
        self._verdict.wait()
        verdict = self._board.verdict
        assert verdict is not None, "it is waited for above"
        if verdict in (0, self._slot.code):
            return  # the normal exit has the right code
        atexit.unregister(self._leave_last)
        end_process(verdict)

    # ------------------------------------------------------ the other ranks

    def _end_alone(self) -> None:
        """Thread of every other rank: exit when the supervisor has ended, since nothing else would end this process."""
        while os.getppid() == self._supervisor:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    def _leave(self) -> None:
        """Exit handler of every other rank, which runs after the handlers that were registered since the fork.

        Handlers from before the fork belong to the first rank, and the cleanup of the interpreter would copy the memory
        of all imports. Both are skipped.
        """
        self._tell_exit_code()
        _flush()
        os._exit(self._slot.code)

    def _tell_exit_code(self) -> None:
        code = self._exit_code.code
        if code and (error := getattr(sys, "last_exc", None)) is not None:
            self._slot.fail(error, code)
        self._slot.code = code
        self._slot.leaving = True


def _has_ended(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] != 0
    except ChildProcessError:  # other code in this process has waited for it
        return True


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or the reader of a pipe has ended
            stream.flush()

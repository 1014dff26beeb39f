"""This process as one of the forked ranks of its node: what it tells the supervisor, and how it ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_mimo.launch.exit_code import ExitCode, code_of
from lightning_mimo.launch.rank_board import NodeBoard

_POLL_SECONDS = 0.1

# What a process was forked as belongs to the process, not to one of its Trainers: a second one must know of it, too.
_this: NodeRank | None = None


def this_node_rank() -> NodeRank | None:
    """This process as a rank, if it is one of several that were forked."""
    return _this


class NodeRank:
    """One rank of a node whose ranks were forked. The first one is the process that the user started."""

    def __init__(self, board: NodeBoard, *, local_rank: int, supervisor: int) -> None:
        """
        Args:
            board: where it tells the supervisor how it fares.
            local_rank: on this node.
            supervisor: process; the parent of all ranks but the first, of which it is a child.
        """
        self._board = board
        self._slot = board.ranks[local_rank]
        self._supervisor = supervisor
        self._exit_code = ExitCode()
        self._verdict = threading.Event()

    @classmethod
    def become(cls, board: NodeBoard, *, local_rank: int, supervisor: int) -> None:
        """Make this process the rank; see the constructor."""
        global _this
        _this = rank = cls(board, local_rank=local_rank, supervisor=supervisor)
        watch, leave = (rank._await_verdict, rank._leave_last) if local_rank == 0 else (rank._end_alone, rank._leave)
        threading.Thread(target=watch, daemon=True, name="lightning-mimo-supervised").start()
        atexit.register(leave)

    @contextlib.contextmanager
    def inside_run(self) -> Iterator[None]:
        """Around what all ranks do together: whoever leaves it by an exception is missed by the others."""
        self._slot.forget()
        self._exit_code.watch(False)
        try:
            yield
        except SIGTERMException:  # agreed on by all ranks
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
        """Have all ranks of this node killed; why was said already."""
        self._board.explain()

    # ------------------------------------------------------------- the first

    def _await_verdict(self) -> None:
        """In a thread of the first rank: end it when the supervisor has ended the others."""
        while self._board.verdict is None:
            if _has_ended(self._supervisor) and self._board.verdict is None:
                line = f"The process that watches over the ranks (process {self._supervisor}) is gone; ending all.\n"
                os.write(2, line.encode())
                os._exit(1)
            time.sleep(_POLL_SECONDS)
        self._verdict.set()
        if self._board.verdict != 0 and not self._slot.leaving:
            os._exit(self._board.verdict)

    def _leave_last(self) -> None:
        """At the exit of the first rank: wait for the others, whose failure must show in the exit code."""
        self._tell_exit_code()
        self._verdict.wait()
        if self._board.verdict in (0, self._slot.code):
            return  # this process ends as it would have
        atexit.unregister(self._leave_last)
        atexit._run_exitfuncs()
        _flush()
        os._exit(self._board.verdict)

    # ------------------------------------------------------------ the others

    def _end_alone(self) -> None:
        """In a thread of another rank: end with the supervisor, as nobody else would end this process."""
        while os.getppid() == self._supervisor:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    def _leave(self) -> None:
        """At the exit of another rank, after what it registered itself.

        What was registered before the fork belongs to the first rank, and the interpreter's own clean-up would copy and
        free every import.
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
    except ChildProcessError:  # somebody else in this process has waited for it
        return True


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads any more
            stream.flush()

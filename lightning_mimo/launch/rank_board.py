"""Shared memory through which the ranks of one node report to their supervisor.

Shared memory and not a pipe or socket: a rank can write to it at any moment without blocking, and it outlives the rank.
"""

from __future__ import annotations

import ctypes
import mmap
import time

_TEXT = 500  # bytes of an error message that are kept


class RankSlot(ctypes.Structure):
    """Report of one rank.

    Attributes:
        pid: process id; 0 before the rank is started.
        failed_at: ``time.monotonic()`` at which an exception left a run of the Trainer, or 0.
        error: type and text of that exception, UTF-8.
        leaving: whether the exit handlers of the rank have started.
        code: exit code of the rank, as far as it is known.
    """

    pid: int
    failed_at: float
    error: bytes
    leaving: bool
    code: int

    _fields_ = (
        ("pid", ctypes.c_int),
        ("failed_at", ctypes.c_double),
        ("error", ctypes.c_char * _TEXT),
        ("leaving", ctypes.c_bool),
        ("code", ctypes.c_int),
    )

    def fail(self, error: BaseException, code: int) -> None:
        """Record that an exception has left a run. Only the first one is kept."""
        if not self.failed_at:
            text = " ".join(f"{type(error).__qualname__}: {error}".removesuffix(": ").split())
            self.error = text.encode(errors="replace")[: _TEXT - 1]
            self.code = code
            self.failed_at = time.monotonic()  # last, because readers check it first

    def forget(self) -> None:
        """Clear the report when a new run begins: the exception of the previous run was caught."""
        self.failed_at = 0.0
        self.error = b""
        self.code = 0


class _NodeSlot(ctypes.Structure):
    explained: bool
    over: bool
    verdict: int

    _fields_ = (("explained", ctypes.c_bool), ("over", ctypes.c_bool), ("verdict", ctypes.c_int))


class NodeBoard:
    """Reports of all ranks of a node and the state of the node, shared with processes that are forked later.

    Attributes:
        ranks: reports by rank on this node.
    """

    def __init__(self, ranks: int) -> None:
        """
        Args:
            ranks: number of ranks on this node.
        """
        slots = RankSlot * ranks
        self._memory = mmap.mmap(-1, ctypes.sizeof(slots) + ctypes.sizeof(_NodeSlot))
        self.ranks = slots.from_buffer(self._memory)
        self._node = _NodeSlot.from_buffer(self._memory, ctypes.sizeof(slots))

    @property
    def explained(self) -> bool:
        """Whether a rank has printed why all must end. The supervisor then kills them without a further message."""
        return self._node.explained

    def explain(self) -> None:
        self._node.explained = True

    @property
    def verdict(self) -> int | None:
        """Exit code of the run, apart from that of the first rank itself; ``None`` before it is known."""
        return self._node.verdict if self._node.over else None

    def conclude(self, verdict: int) -> None:
        self._node.verdict = verdict
        self._node.over = True

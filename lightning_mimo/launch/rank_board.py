"""What the ranks of one node tell the process that watches over them, in memory that they share.

Memory, and no pipe or socket: a rank can fill it in at any moment without waiting, and it outlives the rank.
"""

from __future__ import annotations

import ctypes
import mmap
import time

_TEXT = 500  # bytes of an error's text that are kept


class RankSlot(ctypes.Structure):
    """What one rank tells.

    Attributes:
        pid: its process; 0 before it was started.
        failed_at: ``time.monotonic()`` of when an exception left a run of the Trainer, or 0.
        error: type and text of that exception, UTF-8.
        leaving: whether it has come to its exit handlers.
        code: the exit code that it leaves with, as far as it knows.
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
        """Note that an exception has left a run; the first one counts."""
        if not self.failed_at:
            text = " ".join(f"{type(error).__qualname__}: {error}".removesuffix(": ").split())
            self.error = text.encode(errors="replace")[: _TEXT - 1]
            self.code = code
            self.failed_at = time.monotonic()  # last: whoever reads looks at this first

    def forget(self) -> None:
        """A new run begins: whatever left the one before was caught."""
        self.failed_at = 0.0
        self.error = b""
        self.code = 0


class _NodeSlot(ctypes.Structure):
    explained: bool
    over: bool
    verdict: int

    _fields_ = (("explained", ctypes.c_bool), ("over", ctypes.c_bool), ("verdict", ctypes.c_int))


class NodeBoard:
    """One slot for each rank of the node, and what concerns all; shared with processes that are forked later.

    Attributes:
        ranks: by rank on this node.
    """

    def __init__(self, ranks: int) -> None:
        """
        Args:
            ranks: on this node.
        """
        slots = RankSlot * ranks
        self._memory = mmap.mmap(-1, ctypes.sizeof(slots) + ctypes.sizeof(_NodeSlot))
        self.ranks = slots.from_buffer(self._memory)
        self._node = _NodeSlot.from_buffer(self._memory, ctypes.sizeof(slots))

    @property
    def explained(self) -> bool:
        """Whether a rank has said why all must end: they are killed, and nothing more is said."""
        return self._node.explained

    def explain(self) -> None:
        self._node.explained = True

    @property
    def verdict(self) -> int | None:
        """The exit code of all ranks together, but for that of the first rank itself; ``None`` before it is known."""
        return self._node.verdict if self._node.over else None

    def conclude(self, verdict: int) -> None:
        self._node.verdict = verdict
        self._node.over = True

"""Ends DataLoader workers together with their rank, even while they are loading."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # of prctl(2)


class EndWithRank:
    """A ``worker_init_fn`` that makes the kernel kill the worker when the rank that started it exits.

    torch's workers check their parent only between batches, so a worker that reads a slow file would outlive its rank.
    """

    def __init__(self, then: Callable[[int], object] | None) -> None:
        """
        Args:
            then: the ``worker_init_fn`` of the user's DataLoader, called afterwards.
        """
        self._then = then

    def __call__(self, worker_id: int) -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if self._then is not None:
            self._then(worker_id)

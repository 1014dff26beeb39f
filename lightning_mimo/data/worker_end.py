"""Loader workers that end with their rank, whatever they are doing."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # of prctl(2)


class EndWithRank:
    """A ``worker_init_fn`` that has the kernel kill the worker when the rank that started it is gone.

    torch's workers look for themselves, but only between two batches: one that reads a slow file would stay behind.
    """

    def __init__(self, then: Callable[[int], object] | None) -> None:
        """
        Args:
            then: the loader's own ``worker_init_fn``.
        """
        self._then = then

    def __call__(self, worker_id: int) -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if self._then is not None:
            self._then(worker_id)

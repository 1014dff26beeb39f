"""Whether the machine's cores are free enough to measure on: processes compute on every core and are timed."""

from __future__ import annotations

import os
import time

from tests.support.rank_pool import RankPool

LEAST = 0.5
"""Share of a core that a process must get."""
_COMPUTE = 0.25  # seconds of processor time
_TRIES, _PAUSE = 12, 10.0


class MachineBusyError(RuntimeError):
    """Other programs use the machine, so that nothing can be measured."""


def share_of_core(pool: RankPool) -> float:
    """Share of a core that the worst served of as many processes gets as there are cores.

    Args:
        pool: starts the processes.
    """
    return min(pool.run(_share, world_size=len(os.sched_getaffinity(0)), timeout=120))


def wait_until_quiet(pool: RankPool) -> None:
    """Wait until the cores are free, two minutes at most.

    Raises:
        MachineBusyError: if they are not; says how much of them is left.
    """
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE)
        share = share_of_core(pool)
        if share >= LEAST:
            return
    raise MachineBusyError(
        f"The machine is busy: a process that computes gets {share:.0%} of a core, and {LEAST:.0%} are needed to "
        f"measure anything. It was tried {_TRIES} times in {_TRIES * _PAUSE:.0f} s. Stop other programs, or run this "
        f"with a higher priority."
    )


def _share() -> float:
    begin, computed = time.perf_counter(), time.process_time()
    while time.process_time() - computed < _COMPUTE:
        pass
    return _COMPUTE / (time.perf_counter() - begin)

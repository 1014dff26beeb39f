"""Room for the frames of Python's functions, so that a call costs the same however deep it is.

CPython keeps frames in chunks of 16 KiB: it maps one from the system where a call finds no room in the last, and gives
it back as soon as that call returns (``_PyThreadState_PushFrame`` and ``PopFrame`` in Python/pystate.c, since 3.11).
Where a loop's calls lie on both sides of an end, each of them pays for both; a deep stack, such as Lightning's, moves
that end to anywhere in a model's layers. A chunk is at least as large as the frame that it is made for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_SLOTS = 33_000  # of 8 bytes: more than half of a chunk of 512 KiB, the rest of which is for the frames further in


def with_room_for_frames(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function whose own calls, a thousand deep, all find room in one chunk; what it returned."""
    return function(*args)


with_room_for_frames.__code__ = with_room_for_frames.__code__.replace(co_stacksize=_SLOTS)

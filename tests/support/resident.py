"""What a rank holds: the memory that is its own, and the parameters that are ever made on it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

_SECONDS = 0.002


def own_memory() -> int:
    """Bytes of this process that lie in no file: anonymous and shared memory, resident."""
    text = Path("/proc/self/status").read_text()
    return sum(int(kib) * 1024 for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", text, re.MULTILINE))


class PeakMemory:
    """Looks at this process's own memory all the time. What a fork brought along is not counted."""

    def __init__(self) -> None:
        self._start = own_memory()
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def take(self) -> int:
        """Most bytes since the last call, over what there were at the start."""
        peak, self._peak = max(self._peak, own_memory()), 0
        return peak - self._start

    def _watch(self) -> None:
        while not self._ended.wait(_SECONDS):
            self._peak = max(self._peak, own_memory())


@contextmanager
def counted_parameters() -> Iterator[dict[int, torch.nn.Parameter]]:
    """Every parameter that any module is given while this is open, by id, whatever becomes of it."""
    made: dict[int, torch.nn.Parameter] = {}

    def note(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            made[id(parameter)] = parameter

    hook = register_module_parameter_registration_hook(note)
    try:
        yield made
    finally:
        hook.remove()

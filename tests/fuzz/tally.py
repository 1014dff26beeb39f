"""Counts what became of damaged inputs, and prints it as one line of a table."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["refused", "accepted", "raw", "silent", "hung"]


@dataclass(kw_only=True)
class Tally:
    """What became of the inputs of one kind.

    Attributes:
        kind: of the inputs.
        outcomes: of each input: ``refused`` with one clear message, ``accepted`` because it is valid or harmless,
            ``raw`` for any other exception, ``silent`` if something damaged was used, ``hung`` after the time limit.
        bad: description and message of every input that ended otherwise than refused or accepted.
    """

    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome, what: str, message: str = "") -> None:
        self.outcomes[outcome] += 1
        if outcome not in ("refused", "accepted"):
            self.bad.append(f"{outcome}: {what}: {message}")

    def __str__(self) -> str:
        counts = " ".join(f"{self.outcomes[each]:9}" for each in ("refused", "raw", "accepted", "silent", "hung"))
        return f"{self.kind:24} {self.outcomes.total():6} {counts}"


HEAD = f"{'':24} {'tried':>6} {'refused':>9} {'raw':>9} {'accepted':>9} {'silent':>9} {'hung':>9}"


class TooLong(BaseException):
    """The time limit of one input."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TooLong in the main thread after some seconds."""

    def stop(*_: Any) -> None:
        raise TooLong

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)

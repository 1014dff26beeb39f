"""Two ways of doing the same, timed in turn, so that a machine whose speed drifts is fair to both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds of A and B, and what they are to each other.

    Attributes:
        a: medians of the blocks of A.
        b: medians of the blocks of B.
    """

    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """A over B of each A B B A."""
        return tuple((self.a[i] + self.a[i + 1]) / (self.b[i] + self.b[i + 1]) for i in range(0, len(self.a), 2))

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """Between which two ratios the median of infinitely many would lie, 19 times out of 20 (fewer if they are < 6).

        That each ratio is as likely below that median as above it is all that is taken for granted.
        """
        ratios = sorted(self.ratios)
        below, outside = 0, 0
        while (outside := outside + math.comb(len(ratios), below)) <= 0.025 * 2 ** len(ratios):
            below += 1
        least = max(below - 1, 0)
        return ratios[least], ratios[-1 - least]

    @property
    def differences(self) -> tuple[float, ...]:
        """Seconds of A less those of B, of each A B B A."""
        return tuple((self.a[i] + self.a[i + 1] - self.b[i] - self.b[i + 1]) / 2 for i in range(0, len(self.a), 2))

    @property
    def difference(self) -> float:
        """Median of the differences."""
        return statistics.median(self.differences)

    @property
    def control(self) -> tuple[float, float]:
        """Smallest and largest ratio of two neighbouring blocks of the same: what the noise alone makes."""
        same = [values[i] / values[i + 1] for values in (self.a, self.b) for i in range(0, len(self.a), 2)]
        return min(same), max(same)


def compare(a: Callable[[], float], b: Callable[[], float], *, rounds: int) -> Comparison:
    """Run A B B A ``rounds`` times.

    Args:
        a: runs one block of A and returns its figure: the median of its steps, in seconds.
        b: the same of B.
        rounds: at least 1. A round is four blocks.
    """
    taken: dict[str, list[float]] = {"a": [], "b": []}
    a(), b()  # not counted
    for _ in range(rounds):
        for name, block in (("a", a), ("b", b), ("b", b), ("a", a)):
            taken[name].append(block())
    return Comparison(a=tuple(taken["a"]), b=tuple(taken["b"]))

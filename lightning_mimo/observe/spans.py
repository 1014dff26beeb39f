"""What a rank is doing and has done: the one record that hang reports, telemetry and traces are read from.

A span is one piece of work with a begin and an end. Spans nest. While nobody keeps them, opening one costs a list
entry and a counter.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

FORWARD, BACKWARD = "forward", "backward"
COMPUTING = (FORWARD, BACKWARD)
"""Kinds of work that wait for nobody, but for tensor-parallel peers."""
LOADING = "loading"
"""Kind of work that waits for no rank at all."""

_SOON_SECONDS = 0.5  # after which a GPU is said not to have come to a mark


@dataclass(frozen=True, kw_only=True)
class SpanInfo:
    """What a span is spent on. Made once and used for many spans.

    Attributes:
        kind: ``forward`` (with the loss), ``backward``, ``bridge``, ``pipeline``, ``loading``, ``reduce``, ``sum``
            (over all ranks), ``optimizer`` or ``world`` (between steps).
        label: as in "has waited to ...".
        module: whose work it is; empty where it belongs to none.
        sends: direction of what is sent, ``forward`` or ``backward``.
        receives: direction of what is received.
        edge: from where to where activations go, for transfers.
        peers: global ranks that must take part.
    """

    kind: str
    label: str
    module: str = ""
    sends: str | None = None
    receives: str | None = None
    edge: str = ""
    peers: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Span:
    """A piece of work on this rank.

    Attributes:
        recorder: whose it is.
        info: what is done.
        depth: how many other spans it lies in.
        microbatch: which one is computed, sent or received.
        begin: mark of the recorder's clock; ``None`` if it is not kept.
        end: ``None`` while it is open.
    """

    recorder: Spans = field(repr=False)
    info: SpanInfo
    depth: int
    microbatch: int | None
    begin: Any = None
    end: Any = None

    def __enter__(self) -> Span:
        return self

    def __exit__(self, *exception: object) -> None:
        self.recorder.end(self)

    def __str__(self) -> str:
        return self.info.label if self.microbatch is None else f"{self.info.label}, microbatch {self.microbatch}"


class Clock(Protocol):
    """Marks moments in the work of this rank's device."""

    def mark(self) -> Any:
        """The moment at which the device has done what it was given so far."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Seconds between two marks."""

    def is_past(self, mark: Any) -> bool:
        """Whether the device has come to a mark. Waits a moment at most; for any thread."""

    def is_idle(self) -> bool:
        """Whether the device has done all that it was given. Waits a moment at most; for any thread."""

    def anchor(self) -> tuple[Any, float]:
        """A mark of this moment, and ``perf_counter``. Waits for the device."""


class HostClock:
    """Of a CPU, where work is done when the call returns. ``perf_counter``: monotonic, common to a machine."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def is_past(self, mark: float) -> bool:
        return True

    def is_idle(self) -> bool:
        return True

    def anchor(self) -> tuple[float, float]:
        now = self.mark()
        return now, now


class CudaClock:
    """Of a GPU: events in the current stream, which the host does not wait for when it makes them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def is_past(self, mark: torch.cuda.Event) -> bool:
        return _returns_soon(mark.synchronize)

    def is_idle(self) -> bool:
        # By device, since another thread may have another current one.
        return _returns_soon(torch.cuda.default_stream(self._device).synchronize)

    def anchor(self) -> tuple[torch.cuda.Event, float]:
        mark = self.mark()
        mark.synchronize()
        return mark, time.perf_counter()


def _returns_soon(wait: Callable[[], None]) -> bool:
    """Whether a call that waits for a GPU returns.

    Not by asking the GPU, as ``query()`` does: that holds the interpreter's lock and does not return where another
    thread stands in a launch that the GPU does not take, because its queue is full. ``synchronize()`` holds no lock.
    """
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(_SOON_SECONDS)
    return not thread.is_alive()


def clock_of(device: torch.device) -> Clock:
    """The clock of a rank's device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


class Spans:
    """Records the spans of one rank. Only one thread at a time may open and close them; any may look.

    (The thread in which autograd runs on a GPU counts as that one: the main thread waits for it meanwhile.)

    Attributes:
        keep: whether spans are kept, with their times, until :meth:`drain`.
        changes: grows with every begin and every end.
        last: the span that ended last.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or HostClock()
        self.keep = False
        self.changes = 0
        self.last: Span | None = None
        self._open: list[Span] = []
        self._kept: list[Span] = []

    def span(self, info: SpanInfo, microbatch: int | None = None) -> Span:
        """Open a span inside of the one that is open, until the end of the ``with`` block, or :meth:`end`."""
        span = Span(self, info, len(self._open), microbatch)
        if self.keep:
            span.begin = self.clock.mark()
            self._kept.append(span)
        self._open.append(span)
        self.changes += 1
        return span

    def end(self, span: Span) -> None:
        """Close a span, and those inside of it that an exception left open."""
        if span.begin is not None:
            span.end = self.clock.mark()
        del self._open[span.depth :]
        self.last = span
        self.changes += 1

    def drain(self) -> list[Span]:
        """The spans that have been kept and are closed, in the order of their begin; they are kept no longer."""
        drained = [span for span in self._kept if span.end is not None]
        self._kept = [span for span in self._kept if span.end is None and span in self._open]
        return drained

    def current(self) -> Span | None:
        """What this rank is doing: on a GPU, the first that the device has not done yet. For any thread."""
        for span in tuple(self._kept):
            if span.end is not None and span.depth == 0 and not self.clock.is_past(span.end):
                return span
        innermost = self._open[-1:]
        return innermost[0] if innermost else None

    def own_seconds(self, spans: list[Span]) -> dict[tuple[str, str], float]:
        """(kind, module) -> seconds, those of a span inside of another counted for the inner one only."""
        sums: dict[tuple[str, str], float] = {}
        outer: list[Span] = []
        for span in spans:
            seconds = self.clock.seconds(span.begin, span.end)
            del outer[span.depth :]
            if outer:
                around = outer[-1].info
                sums[around.kind, around.module] -= seconds
            outer.append(span)
            key = span.info.kind, span.info.module
            sums[key] = sums.get(key, 0.0) + seconds
        return sums

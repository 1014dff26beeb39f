"""Recorder of a rank's work, the common source of hang reports, telemetry and traces.

A span is a piece of work with a begin and an end. Spans nest. While recording is off, opening a span costs only a list
entry and a counter increment.
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
"""Kinds of work that wait for no other rank except tensor-parallel peers."""
LOADING = "loading"
"""Kind of work that waits for no other rank."""

_SOON_SECONDS = 0.5  # how long to wait before reporting that a GPU has not reached a mark


@dataclass(frozen=True, kw_only=True)
class SpanInfo:
    """Description of the work in a span. Created once and shared by many spans.

    Attributes:
        kind: ``forward`` (including the loss), ``backward``, ``bridge``, ``pipeline``, ``loading``, ``reduce``, ``sum``
            (over all ranks), ``optimizer`` or ``world`` (between steps).
        label: infinitive that completes "has waited to ...", or a noun.
        module: module that the work belongs to; empty if there is none.
        sends: direction of the sent tensors, ``forward`` or ``backward``.
        receives: direction of the received tensors.
        edge: for transfers, the source and destination of the activations.
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
        recorder: recorder that opened the span.
        info: description of the work.
        depth: number of enclosing spans.
        microbatch: index of the microbatch that is computed, sent or received.
        begin: mark of the recorder's clock; ``None`` if the span is not kept.
        end: like ``begin``; ``None`` also while the span is open.
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
    """Interface of the clocks that mark points in the work of this rank's device."""

    def mark(self) -> Any:
        """Mark the moment at which the device completes all work submitted so far."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the seconds between two marks."""

    def is_past(self, mark: Any) -> bool:
        """Whether the device has reached a mark. Waits briefly at most; any thread may call it."""

    def is_idle(self) -> bool:
        """Whether the device has completed all submitted work. Waits briefly at most; any thread may call it."""

    def anchor(self) -> tuple[Any, float]:
        """Return a mark of the current moment and its ``perf_counter`` time. Synchronizes with the device."""


class HostClock:
    """Clock of a CPU, where work is complete when the call returns.

    Uses ``perf_counter``, which is monotonic and the same for all processes of a machine.
    """

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
    """Clock of a GPU: events in the current stream, recorded asynchronously."""

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
        # The device is explicit because the current device of another thread may differ.
        return _returns_soon(torch.cuda.default_stream(self._device).synchronize)

    def anchor(self) -> tuple[torch.cuda.Event, float]:
        mark = self.mark()
        mark.synchronize()
        return mark, time.perf_counter()


def _returns_soon(wait: Callable[[], None]) -> bool:
    """Whether a call that waits for a GPU returns within ``_SOON_SECONDS``.

    ``query()`` is not used: it holds the GIL and blocks while another thread is blocked in a kernel launch because the
    GPU's queue is full. ``synchronize()`` releases the GIL.
    """
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(_SOON_SECONDS)
    return not thread.is_alive()


def clock_of(device: torch.device) -> Clock:
    """Return the clock of a rank's device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


class Spans:
    """Recorder of the spans of one rank.

    Only one thread at a time may open and close spans; any thread may read. Opening spans in autograd's GPU thread is
    safe, because the main thread waits for it.

    Attributes:
        keep: whether spans are kept, with their times, until :meth:`drain`.
        changes: counter that increases with every begin and every end.
        last: the span that ended most recently.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or HostClock()
        self.keep = False
        self.changes = 0
        self.last: Span | None = None
        self._open: list[Span] = []
        self._kept: list[Span] = []

    def span(self, info: SpanInfo, microbatch: int | None = None) -> Span:
        """Open a span inside the innermost open span, until the end of the ``with`` block or :meth:`end`."""
        span = Span(self, info, len(self._open), microbatch)
        if self.keep:
            span.begin = self.clock.mark()
            self._kept.append(span)
        self._open.append(span)
        self.changes += 1
        return span

    def end(self, span: Span) -> None:
        """Close a span and any inner spans that an exception left open."""
        if span.begin is not None:
            span.end = self.clock.mark()
        del self._open[span.depth :]
        self.last = span
        self.changes += 1

    def drain(self) -> list[Span]:
        """Return and remove the kept spans that are closed, in the order of their begin."""
        drained = [span for span in self._kept if span.end is not None]
        self._kept = [span for span in self._kept if span.end is None and span in self._open]
        return drained

    @property
    def innermost(self) -> SpanInfo | None:
        """The work that the thread of this rank has begun last and not ended, which a GPU may only do later."""
        return self._open[-1].info if self._open else None

    def current(self) -> Span | None:
        """Return the span of this rank's current work. Any thread may call it.

        On a GPU, this is the first span that the device has not completed, if spans are kept.
        """
        for span in tuple(self._kept):
            if span.end is not None and span.depth == 0 and not self.clock.is_past(span.end):
                return span
        innermost = self._open[-1:]
        return innermost[0] if innermost else None

    def own_seconds(self, spans: list[Span]) -> dict[tuple[str, str], float]:
        """Return (kind, module) -> seconds; the time of a nested span counts for the inner span only."""
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

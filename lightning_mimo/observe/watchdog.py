"""Watchdog that reports what every rank waits for when a run hangs, and then ends the run.

A thread in each rank polls the rank's open span; there is no communication between ranks until one hangs. When a rank
has waited for the whole timeout, it writes a report to torch.distributed's store, because process groups would hang as
well. The other ranks find the report there and add theirs, and one rank determines which ranks the others wait for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import PurePath
from types import FrameType

import torch.distributed as dist

from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.observe.spans import COMPUTING, LOADING, Spans
from lightning_mimo.upstream.torch import _get_default_store

_FRAMES = 4
_FROZEN_SECONDS = 30.0  # added to the timeout for a blocked interpreter
_COLLECTIVE = ("torch/distributed/distributed_c10d.py", "torch/distributed/c10d_logger.py")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Report of one rank about its current work.

    Attributes:
        waits: whether the rank waits for another rank.
        label: the current work, as ``has waited 30 s to ...`` or ``has been in ...``.
    """

    waits: bool
    label: str


class Watchdog:
    """Watches one rank from separate threads, from :meth:`start` to :meth:`stop`."""

    def __init__(
        self,
        spans: Spans,
        layout: MimoLayout,
        *,
        timeout: timedelta,
        end_node: Callable[[], None],
        leaves_first: bool,
        on_gpu: bool = False,
    ) -> None:
        """
        Args:
            spans: this rank's recorder.
            layout: assignment of modules to ranks.
            timeout: how long a rank may wait for another.
            end_node: ends the other ranks on this machine that this process knows of.
            leaves_first: whether this rank exits before the others: it started them, and would otherwise report their
                end.
            on_gpu: whether a call that waits for a GPU may block the interpreter, and the watchdog with it. A C thread
                then prints the stack of every thread and ends the process.
        """
        self._spans = spans
        self._layout = layout
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._timeout = timeout.total_seconds()
        self._end_node = end_node
        self._leaves_first = leaves_first
        self._on_gpu = on_gpu
        # A clone has a separate connection: a blocking call may occupy the connection of the store itself.
        self._store = dist.PrefixStore("lightning_mimo/hang", _get_default_store().clone())
        self._poll = min(1.0, self._timeout / 20)
        self._quiet = min(10.0, self._timeout / 2)
        self._longest_wait = self._quiet + 2 * self._poll + 2  # for the reports of all ranks that are able to report
        self._stopped = threading.Event()
        self._main = threading.get_ident()
        self._silent = 0.0  # seconds since this rank began or ended something
        self._called = threading.Event()  # another rank has reported

    @staticmethod
    def patience_after(timeout: timedelta) -> timedelta:
        """Return the timeout for process groups, long enough for the watchdogs to act first."""
        return timeout + timedelta(seconds=60)

    def start(self) -> None:
        for task in (self._watch, self._listen):
            threading.Thread(target=task, daemon=True, name="lightning-mimo-watchdog").start()

    def stop(self) -> None:
        """Stop watching. Not collective."""
        self._stopped.set()

    def _watch(self) -> None:
        changes, before = -1, time.monotonic()
        while not self._stopped.wait(self._poll):
            self._outlive_interpreter()
            now = time.monotonic()
            # The time in which the process was stopped or the machine was suspended does not count as waiting.
            passed, before = min(now - before, 2 * self._poll), now
            self._silent = self._silent + passed if changes == self._spans.changes else 0.0
            changes = self._spans.changes
            if self._called.is_set() or (self._silent >= self._timeout and self._look().waits):
                self._end_run()
        if self._on_gpu:
            faulthandler.cancel_dump_traceback_later()

    def _outlive_interpreter(self) -> None:
        """Schedule the end of the process, by a thread that does not need the GIL, unless called again in time."""
        if self._on_gpu:
            faulthandler.dump_traceback_later(self._timeout + _FROZEN_SECONDS, file=2, exit=True)

    def _listen(self) -> None:
        # In a separate thread, because the store blocks while the process of rank 0 is stopped.
        with contextlib.suppress(RuntimeError):  # rank 0 has exited; this process will be ended as well
            while not self._stopped.wait(self._poll) and not self._called.is_set():
                if self._silent >= self._quiet and self._store.check(["first"]):
                    self._called.set()

    def _look(self) -> Report:
        """Return a report of this rank's current work."""
        silent = self._silent
        frame = sys._current_frames().get(self._main)
        in_collective = _innermost_file(frame).endswith(_COLLECTIVE)
        span = self._spans.current()
        if span is None:
            last = "nothing" if self._spans.last is None else str(self._spans.last)
            verb = "waited" if in_collective else "made no progress"
            return Report(waits=in_collective, label=f"has {verb} for {silent:.0f} s after: {last}; {_place(frame)}")
        peers = f", {_preposition(span.info.label)} {_ranks(span.info.peers)}" if span.info.peers else ""
        if span.info.kind not in (*COMPUTING, LOADING):
            return Report(waits=True, label=f"has waited {silent:.0f} s to {span}{peers}")
        if in_collective:
            return Report(waits=True, label=f"has waited {silent:.0f} s for other ranks in {span}; {_place(frame)}")
        if self._computes_with_others(span.info.module) and not self._spans.clock.is_idle():
            # A GPU waits for other ranks asynchronously, wherever the host is.
            label = f"has waited {silent:.0f} s for its GPU, which communicates with other ranks in {span}"
            return Report(waits=True, label=f"{label}; {_place(frame)}")
        return Report(
            waits=False, label=f"has been in {span} for {silent:.0f} s and waits for no rank; {_place(frame)}"
        )

    def _computes_with_others(self, module: str) -> bool:
        """Whether there are collectives within a module's forward and backward passes, or between them."""
        layout = self._layout
        if layout.colocated and len({sizes.dp for sizes in layout.modules.values()}) > 1:
            return True
        sizes = layout.modules.get(module)
        return sizes is not None and max(sizes.tp, sizes.cp, sizes.ep, sizes.expt_tp) > 1

    def _end_run(self) -> None:
        """Report, let one rank print the conclusion, and exit. Does not return."""
        report = self._look()
        self._print_line(f"{self._name(self._rank)} {report.label}.")
        talk = threading.Thread(target=self._confer, args=(report,), daemon=True)
        talk.start()
        talk.join(2 * self._longest_wait)
        if talk.is_alive():
            self._print_line(
                f"{self._name(self._rank)} cannot reach the other ranks: the process of rank 0 does not answer."
            )
        time.sleep(0.5 if self._leaves_first else 3.0)
        self._end_node()
        os._exit(1)

    def _confer(self, report: Report) -> None:
        """Publish this rank's report; the first rank prints the conclusion, and the others wait for it."""
        try:
            self._store.set(str(self._rank), json.dumps([report.waits, report.label]))
            if int(self._store.compare_set("first", "", str(self._rank))) == self._rank:
                self._print_line(self._conclude())
                self._store.set("concluded", "yes")
            else:
                self._wait_for(["concluded"])
        except RuntimeError:
            self._print_line(
                f"{self._name(self._rank)} cannot reach the other ranks: the process of rank 0 has exited."
            )

    def _wait_for(self, keys: list[str]) -> None:
        deadline = time.monotonic() + self._longest_wait
        while time.monotonic() < deadline and not self._store.check(keys):
            time.sleep(self._poll / 2)

    def _conclude(self) -> str:
        """Determine from the reports which ranks the others wait for, and return the message."""
        ranks = range(self._world_size)
        self._wait_for([str(rank) for rank in ranks])
        reports = {
            rank: Report(waits=waits, label=label)
            for rank in ranks
            if self._store.check([str(rank)])
            for waits, label in [json.loads(self._store.get(str(rank)))]
        }
        silent = "which does not answer: its process has exited or is stopped"
        missing = [f"{self._name(rank)}, {silent}" for rank in ranks if rank not in reports]
        missing += [f"{self._name(rank)}, which {each.label}" for rank, each in reports.items() if not each.waits]
        limit = f"Monitoring(timeout={self._timeout:g} s)"
        if not missing:
            return f"{limit}: all ranks wait for one another, so they do not run the same steps. Ending all ranks."
        return f"{limit}: the others wait for {'; and for '.join(missing)}. Ending all ranks."

    def _name(self, rank: int) -> str:
        modules = self._layout.modules_on(rank)
        stages = sorted({self._layout.modules[name].coordinates(rank)["pp"] for name in modules})
        return f"rank {rank} ({' and '.join(modules)}, stage {' and '.join(map(str, stages))})"

    @staticmethod
    def _print_line(line: str) -> None:
        # A single write, so that the lines of several processes are not interleaved.
        os.write(2, f"\n{line}".encode() + b"\n")


def _preposition(label: str) -> str:
    return {"receive": "from", "send": "to", "finish": "to"}.get(label.partition(" ")[0], "with")


def _ranks(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _innermost_file(frame: FrameType | None) -> str:
    return "" if frame is None else PurePath(frame.f_code.co_filename).as_posix()


def _place(frame: FrameType | None) -> str:
    """Format the innermost calls of a thread's stack, innermost first."""
    calls = reversed(traceback.extract_stack(frame)[-_FRAMES:]) if frame is not None else ()
    return "at " + " < ".join(f"{PurePath(call.filename).name}:{call.lineno} {call.name}" for call in calls)

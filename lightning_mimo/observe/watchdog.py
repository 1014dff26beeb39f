"""Says what every rank waits for when a run hangs, and ends it.

One thread in each rank looks at what the rank has open, and nobody else is asked while all goes well. When a rank has
waited for as long as the timeout, it says so under a key of torch.distributed's store; there, and not through process
groups, which hang, the others find it, and one of them finds out which rank the others wait for.
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
_FROZEN_SECONDS = 30.0  # beyond the timeout, while the interpreter stands still
_COLLECTIVE = ("torch/distributed/distributed_c10d.py", "torch/distributed/c10d_logger.py")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank says of itself.

    Attributes:
        waits: whether it waits for another rank.
        label: what it does: ``has waited 30 s to ...`` or ``has been in ...``.
    """

    waits: bool
    label: str


class Watchdog:
    """Watches one rank from a thread of its own, from :meth:`start` to :meth:`stop`."""

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
            spans: what this rank records.
            layout: which modules are on which ranks.
            timeout: how long a rank may wait for another.
            end_node: ends the other ranks of this machine that this process knows of.
            leaves_first: whether this rank started others, which are to be gone before it would report their end.
            on_gpu: whether a call that waits for a GPU may stop the interpreter, and this watchdog with it. The process
                is then ended from outside of it, with what all threads were doing.
        """
        self._spans = spans
        self._layout = layout
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._timeout = timeout.total_seconds()
        self._end_node = end_node
        self._leaves_first = leaves_first
        self._on_gpu = on_gpu
        # A clone has a connection of its own: the store's may be taken by a call that waits.
        self._store = dist.PrefixStore("lightning_mimo/hang", _get_default_store().clone())
        self._poll = min(1.0, self._timeout / 20)
        self._quiet = min(10.0, self._timeout / 2)
        self._longest_wait = self._quiet + 2 * self._poll + 2  # until all ranks that can have reported
        self._stopped = threading.Event()
        self._main = threading.get_ident()
        self._silent = 0.0  # seconds since this rank began or ended something
        self._called = threading.Event()  # another rank has reported

    @staticmethod
    def patience_after(timeout: timedelta) -> timedelta:
        """How long process groups are to wait: so much longer that the watchdogs come first."""
        return timeout + timedelta(seconds=60)

    def start(self) -> None:
        for task in (self._watch, self._listen):
            threading.Thread(target=task, daemon=True, name="lightning-mimo-watchdog").start()

    def stop(self) -> None:
        """Watch no longer. Needs no other rank."""
        self._stopped.set()

    def _watch(self) -> None:
        changes, before = -1, time.monotonic()
        while not self._stopped.wait(self._poll):
            self._outlive_interpreter()
            now = time.monotonic()
            # A process that was stopped and goes on, or a machine that slept, has not waited for anybody.
            passed, before = min(now - before, 2 * self._poll), now
            self._silent = self._silent + passed if changes == self._spans.changes else 0.0
            changes = self._spans.changes
            if self._called.is_set() or (self._silent >= self._timeout and self._look().waits):
                self._end_run()
        if self._on_gpu:
            faulthandler.cancel_dump_traceback_later()

    def _outlive_interpreter(self) -> None:
        """Have the process ended, by a thread that needs no interpreter, if this is not called again in time."""
        if self._on_gpu:
            faulthandler.dump_traceback_later(self._timeout + _FROZEN_SECONDS, file=2, exit=True)

    def _listen(self) -> None:
        # Apart from the other thread: where rank 0's process stands still, the store answers nobody.
        with contextlib.suppress(RuntimeError):  # or it is gone, and the end of this one is on its way
            while not self._stopped.wait(self._poll) and not self._called.is_set():
                if self._silent >= self._quiet and self._store.check(["first"]):
                    self._called.set()

    def _look(self) -> Report:
        """What this rank does at this moment."""
        silent = self._silent
        frame = sys._current_frames().get(self._main)
        in_collective = _innermost_file(frame).endswith(_COLLECTIVE)
        span = self._spans.current()
        if span is None:
            last = "nothing" if self._spans.last is None else str(self._spans.last)
            verb = "waited" if in_collective else "not gone on"
            return Report(waits=in_collective, label=f"has {verb} for {silent:.0f} s after: {last}; {_place(frame)}")
        peers = f", {_preposition(span.info.label)} {_ranks(span.info.peers)}" if span.info.peers else ""
        if span.info.kind not in (*COMPUTING, LOADING):
            return Report(waits=True, label=f"has waited {silent:.0f} s to {span}{peers}")
        if in_collective:
            return Report(waits=True, label=f"has waited {silent:.0f} s for others inside of {span}; {_place(frame)}")
        if self._computes_with_others(span.info.module) and not self._spans.clock.is_idle():
            # A GPU waits for others by itself, while the host is anywhere.
            label = f"has waited {silent:.0f} s for its GPU, which has others to wait for inside of {span}"
            return Report(waits=True, label=f"{label}; {_place(frame)}")
        return Report(
            waits=False, label=f"has been in {span} for {silent:.0f} s and waits for no rank; {_place(frame)}"
        )

    def _computes_with_others(self, module: str) -> bool:
        """Whether there are collectives inside of a module's forward and backward passes, or between them."""
        layout = self._layout
        if layout.colocated and len({sizes.dp for sizes in layout.modules.values()}) > 1:
            return True
        sizes = layout.modules.get(module)
        return sizes is not None and max(sizes.tp, sizes.cp, sizes.ep, sizes.expt_tp) > 1

    def _end_run(self) -> None:
        """Report, let one rank conclude, and leave. Does not return."""
        report = self._look()
        self._say(f"{self._name(self._rank)} {report.label}.")
        talk = threading.Thread(target=self._confer, args=(report,), daemon=True)
        talk.start()
        talk.join(2 * self._longest_wait)
        if talk.is_alive():
            self._say(f"{self._name(self._rank)} cannot ask the others: the process of rank 0 does not answer.")
        time.sleep(0.5 if self._leaves_first else 3.0)
        self._end_node()
        os._exit(1)

    def _confer(self, report: Report) -> None:
        """Tell the others; the first one concludes, and the others wait until it has."""
        try:
            self._store.set(str(self._rank), json.dumps([report.waits, report.label]))
            if int(self._store.compare_set("first", "", str(self._rank))) == self._rank:
                self._say(self._conclude())
                self._store.set("concluded", "yes")
            else:
                self._wait_for(["concluded"])
        except RuntimeError:
            self._say(f"{self._name(self._rank)} cannot ask the others: the process of rank 0 is gone.")

    def _wait_for(self, keys: list[str]) -> None:
        deadline = time.monotonic() + self._longest_wait
        while time.monotonic() < deadline and not self._store.check(keys):
            time.sleep(self._poll / 2)

    def _conclude(self) -> str:
        """Which ranks the others wait for, as far as it can be told."""
        ranks = range(self._world_size)
        self._wait_for([str(rank) for rank in ranks])
        reports = {
            rank: Report(waits=waits, label=label)
            for rank in ranks
            if self._store.check([str(rank)])
            for waits, label in [json.loads(self._store.get(str(rank)))]
        }
        silent = "which does not answer: its process is gone, or stands still"
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
    def _say(line: str) -> None:
        # One call, so that the lines of several processes do not mix.
        os.write(2, f"\n{line}".encode() + b"\n")


def _preposition(label: str) -> str:
    return {"receive": "from", "send": "to", "finish": "to"}.get(label.partition(" ")[0], "with")


def _ranks(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _innermost_file(frame: FrameType | None) -> str:
    return "" if frame is None else PurePath(frame.f_code.co_filename).as_posix()


def _place(frame: FrameType | None) -> str:
    """Where a thread is, the innermost call first."""
    calls = reversed(traceback.extract_stack(frame)[-_FRAMES:]) if frame is not None else ()
    return "at " + " < ".join(f"{PurePath(call.filename).name}:{call.lineno} {call.name}" for call in calls)

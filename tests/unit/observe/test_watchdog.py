"""What a rank says of itself when a run hangs, where the host and its device are at different places."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from lightning_mimo import ModuleParallelism as Cut
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.observe.spans import SpanInfo, Spans
from lightning_mimo.observe.watchdog import Watchdog

FORWARD = SpanInfo(kind="forward", label="forward of language", module="language")


class Gpu:
    """Stands for a GPU that has come to no mark yet, or to all."""

    def __init__(self, *, idle: bool) -> None:
        self._idle = idle

    def mark(self) -> float:
        return 0.0

    def seconds(self, begin: float, end: float) -> float:
        return 0.0

    def is_past(self, mark: float) -> bool:
        return self._idle

    def is_idle(self) -> bool:
        return self._idle

    def anchor(self) -> tuple[float, float]:
        return 0.0, 0.0


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def watchdog(spans: Spans, language: Cut) -> Watchdog:
    layout = MimoLayout.resolve({"images": Cut(dp=2), "language": language}, world_size=2, colocate=True)
    return Watchdog(spans, layout, timeout=timedelta(seconds=5), end_node=lambda: None, leaves_first=True)


def test_host_that_is_ahead_of_a_gpu_in_a_tensor_parallel_pass_waits_for_others() -> None:
    spans = Spans(Gpu(idle=False))
    spans.keep = True
    with spans.span(FORWARD, 1):
        pass
    report = watchdog(spans, Cut(tp=2))._look()
    assert report.waits
    assert "for its GPU, which has others to wait for inside of forward of language, microbatch 1" in report.label


def test_gpu_that_computes_alone_waits_for_nobody() -> None:
    spans = Spans(Gpu(idle=False))
    spans.keep = True
    with spans.span(FORWARD, 1):
        pass
    report = watchdog(spans, Cut(dp=2))._look()
    assert not report.waits
    assert "has been in forward of language, microbatch 1 for" in report.label


FROZEN = """
import ctypes, time
from datetime import timedelta
import torch.distributed as dist
from lightning_mimo import ModuleParallelism as Cut
from lightning_mimo.layout import MimoLayout
from lightning_mimo.observe import watchdog
from lightning_mimo.spans import Spans

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
layout = MimoLayout.resolve({"language": Cut()}, world_size=1)
watchdog._FROZEN_SECONDS = 1.0
watchdog.Watchdog(
    Spans(), layout, timeout=timedelta(seconds=1), end_node=lambda: None, leaves_first=True, on_gpu=True
).start()
time.sleep(0.5)
def a_call_that_keeps_the_interpreter():
    ctypes.PyDLL(None).sleep(100)
a_call_that_keeps_the_interpreter()
"""


def test_process_whose_interpreter_stands_still_is_ended_with_its_tracebacks() -> None:
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", FROZEN], capture_output=True, text=True, timeout=90)
    assert ended.returncode == 1, ended.stderr
    assert "in a_call_that_keeps_the_interpreter" in ended.stderr


def test_host_that_stands_still_while_its_gpu_has_nothing_to_do_is_what_others_wait_for() -> None:
    spans = Spans(Gpu(idle=True))
    with spans.span(FORWARD, 1):
        report = watchdog(spans, Cut(tp=2))._look()
    assert not report.waits

"""The recorder of what a rank does, and what is made of it, without ranks."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from lightning_mimo import ModuleParallelism, StepTrace
from lightning_mimo.commands.cli import main
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.observe.spans import SpanInfo, Spans
from lightning_mimo.observe.trace import RankTrace, chrome_trace, describe_shares, shares, trace_of_rank

FORWARD = SpanInfo(kind="forward", label="forward of images", module="images")
BRIDGE = SpanInfo(kind="bridge", label="exchange", module="images")


class CountingClock:
    """Every mark is a second after the one before; a device that has come to the first ``done`` of them."""

    def __init__(self, done: float = float("inf")) -> None:
        self.now = 0.0
        self.done = done

    def mark(self) -> float:
        self.now += 1.0
        return self.now

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def is_past(self, mark: float) -> bool:
        return mark <= self.done

    def is_idle(self) -> bool:
        return self.now <= self.done

    def anchor(self) -> tuple[float, float]:
        return 0.0, 0.0


def test_time_of_an_inner_span_counts_once():
    spans = Spans(CountingClock())
    spans.keep = True
    with spans.span(FORWARD), spans.span(BRIDGE):
        pass
    taken = spans.drain()
    assert [(span.info, span.begin, span.end, span.depth) for span in taken] == [(FORWARD, 1, 4, 0), (BRIDGE, 2, 3, 1)]
    assert spans.own_seconds(taken) == {("forward", "images"): 2.0, ("bridge", "images"): 1.0}
    assert spans.drain() == []


def test_nothing_is_kept_unless_asked_for_but_what_is_open_can_be_seen():
    spans = Spans(CountingClock())
    with spans.span(FORWARD, 3):
        assert str(spans.current()) == "forward of images, microbatch 3"
        changes = spans.changes
    assert spans.changes == changes + 1
    assert spans.current() is None
    assert spans.last.info is FORWARD
    assert spans.drain() == []


def test_an_exception_closes_all_spans_inside():
    spans = Spans(CountingClock())
    spans.keep = True
    with pytest.raises(ZeroDivisionError, match="division"), spans.span(FORWARD):
        spans.span(BRIDGE)
        _ = 1 / 0
    assert spans.current() is None
    assert [span.info for span in spans.drain()] == [FORWARD]


def test_a_device_that_is_behind_is_doing_what_it_has_not_done_yet():
    spans = Spans(CountingClock(done=2.0))
    spans.keep = True
    with spans.span(FORWARD):
        pass
    with spans.span(BRIDGE):
        pass
    with spans.span(SpanInfo(kind="optimizer", label="update the weights")):
        assert spans.current().info is BRIDGE


def two_ranks() -> list[RankTrace]:
    """Two seconds of forward, one in which the result is sent; the other rank waits for it from the start."""
    layout = MimoLayout.resolve({"images": ModuleParallelism(), "language": ModuleParallelism()}, world_size=2)
    traces = []
    for rank, (module, how) in enumerate([("images", "sends"), ("language", "receives")]):
        spans = Spans(CountingClock())
        spans.keep = True
        info = SpanInfo(kind="bridge", label=how, module=module, edge="images -> language", peers=(1 - rank,))
        if rank == 0:
            with spans.span(FORWARD, 0):
                spans.clock.mark()
        with spans.span(replace(info, **{how: "forward"}), 0):
            spans.clock.now += 2 * rank
        traces.append(trace_of_rank(rank, layout, spans.drain(), spans.clock, (0.0, 0.0)))
    return traces


def test_shares_of_the_step_add_up_and_idle_is_what_is_not_computed():
    found = shares(two_ranks())
    assert all(sum(kinds.values()) == pytest.approx(1.0) for kinds in found.values())
    assert found["images"]["forward"] == pytest.approx(0.4)
    assert describe_shares(two_ranks()) == (
        "images: idle 60% of the step (bridge 20%, nothing recorded 40%)\n"
        "language: idle 100% of the step (bridge 60%, nothing recorded 40%)"
    )


def test_an_arrow_leads_from_the_send_to_the_receive():
    events = chrome_trace(two_ranks())["traceEvents"]
    (start,) = [event for event in events if event["ph"] == "s"]
    (end,) = [event for event in events if event["ph"] == "f"]
    assert (start["pid"], end["pid"], start["id"]) == (0, 1, end["id"])
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["rank 0: images, stage 0, tp0 dp0", "rank 1: language, stage 0, tp0 dp0"]


def test_step_trace_refuses_a_step_before_the_first(tmp_path: Path):
    with pytest.raises(ValueError, match=r"StepTrace\(step=-1\): step is the number of optimizer steps to skip"):
        StepTrace(tmp_path, step=-1)


def test_missing_matplotlib_is_named_before_anything_starts(tmp_path: Path):
    message = r"needs matplotlib, which is not installed: pip install 'lightning-mimo\[trace\]'"
    with mock.patch.dict(sys.modules, matplotlib=None), pytest.raises(ModuleNotFoundError, match=message):
        StepTrace(tmp_path)


def test_trace_goes_with_fit_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["lightning-mimo"])
    with pytest.raises(SystemExit, match="2"):
        main(["validate", "--config", "configs/digits_vlm.yaml", "--trace", "traces"])
    assert "--trace records a training step: it works with fit, not with validate." in capsys.readouterr().err


def test_command_line_names_missing_matplotlib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["lightning-mimo"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "configs/digits_vlm.yaml", "--trace", "traces"])
    assert "lightning-mimo: error: Drawing a step needs matplotlib" in capsys.readouterr().err

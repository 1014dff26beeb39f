from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import ModuleParallelism
from lightning_mimo.observe.spans import SpanInfo
from lightning_mimo.observe.trace import RankTrace, TracedSpan, chrome_trace
from lightning_mimo.planning.comparison import check_trace, compare, describe_comparison, read_trace
from lightning_mimo.planning.simulation import Edge, Segment, SimulatedStage, Simulation, simulate
from lightning_mimo.planning.timeline import traces_of

LAYOUT = MimoLayout.resolve({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1)}, world_size=2)


def _simulation(slower: float = 1.0) -> Simulation:
    def stage(name: str, forward: float, backward: float, **options) -> SimulatedStage:
        return SimulatedStage(
            key=(name, 0, 0),
            ranks=1,
            forward=(Segment(module=name, kind="forward", seconds=[forward] * 3),),
            backward=(Segment(module=name, kind="backward", seconds=[backward] * 3),),
            update=0.25,
            reduce=0.125,
            last_bucket=0.125,
            **options,
        )

    images = stage("images", 1.0, 2.0, behind=1, gradients=(Edge(source=("language", 0, 0), seconds=0.5),))
    language = stage("language", 2.0, 3.0 * slower, behind=0, activations=(Edge(source=("images", 0, 0), seconds=0.5),))
    return simulate([images, language], num_microbatches=3, sum_seconds=0.1)


def _write(ranks: list[RankTrace], folder: Path) -> Path:
    file = folder / "step=5.json"
    file.write_text(json.dumps(chrome_trace(ranks)))
    return file


def test_a_simulated_step_compared_with_itself(tmp_path: Path) -> None:
    simulation = _simulation()
    ranks = read_trace(_write(traces_of(simulation), tmp_path))
    check_trace(ranks, LAYOUT, path=tmp_path)
    found = compare(ranks, simulation)
    assert {each.module for each in found} == {"images", "language"}
    assert all(each.seconds == pytest.approx(0, abs=1e-6) for each in found)
    for trace in traces_of(simulation):
        assert sum(trace.seconds().values()) == pytest.approx(simulation.seconds)


def test_the_largest_difference_is_named(tmp_path: Path) -> None:
    ranks = read_trace(_write(traces_of(_simulation(slower=1.5)), tmp_path))
    simulation = _simulation()
    text = describe_comparison(ranks, simulation, compare(ranks, simulation))
    assert "largest difference besides waiting: backward of language, 4500.0 ms longer than simulated" in text


def test_what_is_not_simulated_does_not_hide_the_largest_difference_of_what_is(tmp_path: Path) -> None:
    first, *others = traces_of(_simulation(slower=1.5))
    loading = TracedSpan(
        info=SpanInfo(kind="loading", label="load"), depth=0, microbatch=None, begin=first.end, end=first.end + 60.0
    )
    slow = replace(first, end=loading.end, spans=(*first.spans, loading))
    ranks = read_trace(_write([slow, *others], tmp_path))
    simulation = _simulation()
    text = describe_comparison(ranks, simulation, compare(ranks, simulation))
    assert "loading of images, 60000.0 ms longer than simulated; of what the simulation has: backward of" in text


def test_inner_spans_count_once(tmp_path: Path) -> None:
    outer, inner = SpanInfo(kind="forward", label="forward"), SpanInfo(kind="bridge", label="exchange")
    spans = (
        TracedSpan(info=outer, depth=0, microbatch=0, begin=0.0, end=1.0),
        TracedSpan(info=inner, depth=1, microbatch=0, begin=0.25, end=0.5),
    )
    trace = RankTrace(rank=0, modules=("language",), label="tp0 dp0", stage=0, begin=0.0, end=1.0, spans=spans)
    (found,) = read_trace(_write([trace], tmp_path))
    assert found.seconds()["forward"] == pytest.approx(0.75) and found.seconds()["bridge"] == pytest.approx(0.25)


def test_a_trace_of_another_run(tmp_path: Path) -> None:
    ranks = traces_of(_simulation())
    with pytest.raises(ConfigError, match="is a trace of 1 ranks, but the config has 2"):
        check_trace(ranks[:1], LAYOUT, path=tmp_path)
    swapped = [replace(ranks[0], modules=("language",)), ranks[1]]
    with pytest.raises(ConfigError, match="rank 0 ran language, but in the config it has images"):
        check_trace(swapped, LAYOUT, path=tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"traceEvents": [{"ph": "X"}]}', '{"traceEvents": 3}'])
def test_no_trace(tmp_path: Path, content: str) -> None:
    file = tmp_path / "step.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"is no trace of this package|holds no ranks"):
        read_trace(file)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "gone.json")

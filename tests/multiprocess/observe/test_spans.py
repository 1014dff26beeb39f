"""What is recorded of a step over all ranks: the trace, the figures of each module, one clock, and the timeouts."""

from __future__ import annotations

import csv
import json
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger

from lightning_mimo import ModuleParallelism, Monitoring, StepTrace
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.observe.clocks import offset_to_rank_0
from lightning_mimo.planning import comparison
from tests.parity.cases import apart, task, together
from tests.parity.layouts import Layout, train
from tests.parity.model import Samples
from tests.parity.oracle import Task
from tests.support.rank_pool import RankFailure, RankPool

Trace = dict[str, Any]


def traced(task: Task, layout: Layout, folder: Path) -> tuple[dict[str, float], set[timedelta]]:
    """Train and trace the second step; this rank's last telemetry, and the timeouts of its groups."""
    recorder, _, strategy = train(
        task,
        layout,
        callbacks=[StepTrace(folder, step=1)],
        strategy_options={"monitoring": Monitoring(timeout=timedelta(seconds=77))},
        logger=CSVLogger(folder, name="logs", version=0),
        log_every_n_steps=2,
    )
    metrics = recorder.telemetry
    collections = [group for each in strategy.infra.pg_collections.values() for group in vars(each).values()]
    if not layout.colocate:
        collections += [strategy.infra.group_of_all(purpose) for purpose in ("activations sent", "gradients sent")]
    groups = [group for group in collections if isinstance(group, dist.ProcessGroup)]
    timeouts = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    strategy.infra.destroy()
    return metrics, timeouts


def slices_by_rank(trace: Trace) -> dict[int, list[Trace]]:
    found: dict[int, list[Trace]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found.setdefault(event["pid"], []).append(event)
    return found


def check_nesting(slices: list[Trace]) -> None:
    """In the order of their begin, each lies inside of the one that is open, or after it."""
    assert [each["ts"] for each in slices] == sorted(each["ts"] for each in slices)
    ends: list[float] = []
    for each in slices:
        end = each["ts"] + each["dur"]
        assert each["dur"] >= 0
        while ends and ends[-1] <= each["ts"] + 1e-3:
            ends.pop()
        assert not ends or end <= ends[-1] + 1e-3, each
        ends.append(end)


def read_trace(folder: Path) -> Trace:
    assert (folder / "step=1.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "step=1.json").read_text())


def test_trace_of_a_pipeline_covers_what_the_schedule_did(rank_pool: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the integrations dependency group")
    layout = apart(ModuleParallelism(dp=2), ModuleParallelism(pp=2), num_microbatches=3)
    found = rank_pool.run(traced, task(steps=4), layout, tmp_path, world_size=4)
    trace = read_trace(tmp_path)
    slices = slices_by_rank(trace)
    for rank, own in slices.items():
        check_nesting(own)
        module = "images" if rank < 2 else "language"
        names = Counter(each["name"] for each in own)
        assert (names[f"forward of {module}"], names[f"backward of {module}"]) == (3, 3)
        assert names["loss"] == (3 if rank == 3 else 0)
        for kind in ("forward", "backward"):
            assert [each["args"]["microbatch"] for each in own if each["name"] == f"{kind} of {module}"] == [0, 1, 2]
        assert names[f"reduce the gradients of {module}"] == names["update the weights"] == 1
    processes = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert processes[1] == "rank 1: images, stage 0, tp0 dp1"
    assert processes[3] == "rank 3: language, stage 1, tp0 dp0"
    # Each of 3 microbatches goes over two bridges and from stage to stage, and its gradients go back.
    starts = {e["id"]: e for e in trace["traceEvents"] if e["ph"] == "s"}
    ends = {e["id"]: e for e in trace["traceEvents"] if e["ph"] == "f"}
    assert Counter((e["pid"], ends[e["id"]]["pid"]) for e in starts.values()) == dict.fromkeys(
        [(0, 2), (1, 2), (2, 3), (3, 2), (2, 0), (2, 1)], 3
    )
    assert all(e["ts"] <= ends[number]["ts"] for number, e in starts.items()), "one clock"
    check_planners_view(tmp_path / "step=1.json", layout)
    check_telemetry([metrics for metrics, _ in found], tmp_path)
    assert all(timeouts == {timedelta(seconds=77 + 60)} for _, timeouts in found)


def check_planners_view(path: Path, layout: Layout) -> None:
    """``plan --compare`` reads the same step: every span once, on the ranks of the config."""
    ranks = comparison.read_trace(path)
    comparison.check_trace(ranks, MimoLayout.resolve(layout.modules, world_size=4), path=path)
    assert [(each.rank, each.stage) for each in ranks] == [(0, 0), (1, 0), (2, 0), (3, 1)]
    for each in ranks:
        seconds = each.seconds()
        assert sum(seconds.values()) == pytest.approx(each.end - each.begin)
        assert all(seconds[kind] > 0 for kind in ("forward", "backward", "optimizer"))


def check_telemetry(found: list[dict[str, float]], folder: Path) -> None:
    assert all(metrics == found[0] for metrics in found), "the same on every rank"
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["telemetry/images/compute_s"]]
    assert [row["step"] for row in logged] == ["1", "3"]
    last = {name: float(value) for name, value in logged[-1].items() if name.startswith("telemetry/")}
    assert last == pytest.approx(found[0])
    for name in ("images", "language"):
        assert 0 < last[f"telemetry/{name}/compute_s"] < 10
        assert last[f"telemetry/{name}/bridge_s"] > 0
        assert 10 < last[f"telemetry/{name}/peak_memory_mib"] < 20_000
    assert last["telemetry/language/pipeline_s"] > 0
    assert "telemetry/images/pipeline_s" not in last
    assert 1 <= last["telemetry/images/imbalance"] <= 2, "of two replicas"
    assert "telemetry/language/imbalance" not in last
    # What is logged with step 3 is of steps 1 and 2: all 24 samples once.
    samples = [Samples().images[index % len(Samples().images)] for index in range(24)]
    ratio = last["telemetry/images/samples_per_sec"] / last["telemetry/language/samples_per_sec"]
    assert ratio == pytest.approx(sum(images > 0 for images in samples) / len(samples), rel=0.2)


def test_trace_of_modules_that_share_their_ranks_tells_them_apart(rank_pool: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the integrations dependency group")
    layout = together(ModuleParallelism(dp=2), ModuleParallelism(tp=2))
    rank_pool.run(traced, task(steps=3, accumulate=2, samples=Samples(number=72)), layout, tmp_path, world_size=2)
    for own in slices_by_rank(read_trace(tmp_path)).values():
        check_nesting(own)
        names = Counter(each["name"] for each in own)
        for module in ("images", "language"):
            # Two batches of an accumulation window with two microbatches each.
            assert (names[f"forward of {module}"], names[f"backward of {module}"]) == (4, 4)
            assert names[f"reduce the gradients of {module}"] == 1
        assert names["exchange images -> language, forward"] == 4


def test_step_that_never_comes_is_refused_before_training(rank_pool: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the integrations dependency group")
    message = r"StepTrace\(step=1\) skips 1 steps and records the next, but this run has 1 \(max_steps=1\)"
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(traced, task(steps=1), together(ModuleParallelism(), ModuleParallelism()), tmp_path, world_size=1)


def estimate(ahead: float) -> float:
    rank = dist.get_rank()
    return offset_to_rank_0(
        torch.device("cpu"),
        clock=lambda: time.perf_counter() + (ahead if rank else 0),
        machine="one" if rank == 0 else "two",
    )


def test_clocks_of_two_machines_are_brought_together(rank_pool: RankPool) -> None:
    first, *others = rank_pool.run(estimate, 5.0, world_size=3)
    assert first == 0
    assert others[0] == others[1] == pytest.approx(-5.0, abs=0.05)

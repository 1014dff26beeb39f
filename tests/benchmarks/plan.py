"""How near the planner's step times come to measured ones, and how good the layout is that it picks.

Modules sleep in the place of computing, a known time for every sample. Three models, in which the encoder takes little,
as much as the language module and more, are trained in every legal layout on 2, 4 and 8 ranks. The planner prices the
same layouts with the same code as for GPUs; its hardware is one on which the sleeps are the arithmetic. What a run
takes besides is calibrated by runs of a fourth model, three before each model and one after every few layouts, because
the machine changes. Regret is how much slower the layout that the planner picks is, measured, than the fastest one
measured.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lightning_mimo import MimoStrategy
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE, ModuleParallelism, ResolvedParallelism
from lightning_mimo.planning.candidate import Candidate, Model, Variant
from lightning_mimo.planning.costs import Message, ModuleCosts, ModuleWork, Operations, PartCosts, Work
from lightning_mimo.planning.hardware import Hardware, Link
from lightning_mimo.planning.layouts import Degrees, legal_layouts
from lightning_mimo.planning.pricing import price_stages
from lightning_mimo.planning.step import simulate_step
from tests.benchmarks.quiet import quiet_trainer
from tests.benchmarks.quiet_machine import wait_until_quiet
from tests.benchmarks.report import Cell, Report
from tests.benchmarks.sleeping import Cost, SleepingData, SleepingModule
from tests.parity.layouts import PoolEnvironment
from tests.support.rank_pool import RankPool

DEGREES = {"images": Degrees(tp=(1, 2)), "language": Degrees(tp=(1, 2), pp=(1, 2, 4))}
WORLDS = (2, 4, 8)
BATCH, MICROBATCHES, RUN_AHEAD = 32, 4, 1
SHARES = {"light": 0.15, "even": 0.45, "heavy": 0.7}
"""Encoder of the model -> share of its time that the encoder takes."""
SECONDS = 0.025
"""What a sample takes, times the number of ranks, so that a perfect step takes 32 times this in every world."""
TARGET_ERROR, TARGET_REGRET = 0.05, 0.03
_MOST_SPREAD = 0.05  # of the steps of a run: above it other programs were in the way, and the run is repeated
_MOST_RUNS = 3
_LAYOUTS_BETWEEN = 5  # layouts between two calibration runs
_LAYERS = 8  # of the language module, as far as the planner knows: what its numbers of stages divide
_PEAK = 1e12
_MESSAGES_FORWARD, _MESSAGES_BACKWARD = 4, 1


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What a run takes besides the sleeps.

    Attributes:
        pass_seconds: of every forward or backward pass of a microbatch.
        step_seconds: of every step.
        message_seconds: of an all-reduce of a few bytes over tensor-parallel ranks.
    """

    pass_seconds: float
    step_seconds: float
    message_seconds: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One layout.

    Attributes:
        layout: as text.
        ranks: of the world.
        predicted: seconds of a step.
        measured: seconds of a step, the median.
        steps: seconds of all measured steps.
        runs: how often the layout was run until its steps took equally long.
    """

    layout: str
    ranks: int
    predicted: float
    measured: float
    steps: tuple[float, ...]
    runs: int


class _Timer(pl.Callback):
    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.marks.append(time.perf_counter())


def costs_of_model(share: float, ranks: int) -> dict[str, Cost]:
    """Seconds of a whole module for a sample; a backward pass takes twice as long as a forward pass."""
    seconds = {"images": share * SECONDS * ranks, LANGUAGE: (1 - share) * SECONDS * ranks}
    return {name: Cost(forward=each / 3, backward=2 * each / 3) for name, each in seconds.items()}


def _train(
    modules: dict[str, ModuleParallelism], colocate: bool, costs: Mapping[str, Cost], microbatches: int, steps: int
) -> list[float]:
    """Train on this rank; return the seconds of all steps but the first two, which make connections and fill caches."""
    timer = _Timer()
    strategy = MimoStrategy(
        modules,
        BATCH,
        microbatches,
        colocate=colocate,
        encoder_run_ahead=RUN_AHEAD,
        cluster_environment=PoolEnvironment(),
    )
    trainer = quiet_trainer(strategy, max_steps=steps + 3, callbacks=[timer])
    trainer.fit(SleepingModule(costs), DataLoader(SleepingData(["images"]), batch_size=BATCH))
    strategy.infra.destroy()
    return [end - begin for begin, end in pairwise(timer.marks[2:])]


def _measure(
    pool: RankPool, layout: MimoLayout, costs: Mapping[str, Cost], microbatches: int, steps: int
) -> tuple[list[float], int]:
    """Seconds of every step, each as long as it took the slowest rank, and the number of runs.

    A run whose steps differ is repeated; the one counts in which they differ least.
    """
    world, modules, runs = layout.world_size, dict(layout.modules), []
    for _ in range(_MOST_RUNS):
        if runs:
            wait_until_quiet(pool)
        ranks = pool.run(_train, modules, layout.colocated, costs, microbatches, steps, world_size=world, timeout=300)
        runs.append([max(step) for step in zip(*ranks, strict=True)])
        if _spread(runs[-1]) <= _MOST_SPREAD:
            break
    return min(runs, key=_spread), len(runs)


def _spread(steps: Sequence[float]) -> float:
    return (max(steps) - min(steps)) / statistics.median(steps)


def _calibration_run(pool: RankPool, ranks: int, tp: int, microbatches: int, *, steps: int) -> float:
    """Seconds that a step of the fourth model takes besides the sleeps, colocated with the same tp of both modules."""
    layouts = legal_layouts(DEGREES, world_size=ranks, global_batch_size=BATCH)
    layout = next(each for each in layouts if each.colocated and all(size.tp == tp for size in each.modules.values()))
    seconds, _ = _measure(pool, layout, costs_of_model(0.3, ranks), microbatches, steps)
    return statistics.median(seconds) - SECONDS * BATCH


def calibrate(pool: RankPool, ranks: int, *, steps: int) -> Overhead:
    """Measure what passes, steps and messages take besides the sleeps, with three runs of a model of its own."""
    few, many = 1, BATCH // ranks
    first, second, divided = (
        _calibration_run(pool, ranks, tp, number, steps=steps)
        for tp, number in ((1, few), (1, many), (2, MICROBATCHES))
    )
    # A colocated rank runs a forward and a backward pass of both modules for every microbatch.
    of_pass = max(0.0, (second - first) / (4 * (many - few)))
    of_step = max(1e-6, first - 4 * few * of_pass)
    of_messages = max(0.0, divided - of_step - 4 * MICROBATCHES * of_pass)
    return Overhead(
        pass_seconds=of_pass,
        step_seconds=of_step,
        message_seconds=max(1e-6, of_messages / (MICROBATCHES * (_MESSAGES_FORWARD + _MESSAGES_BACKWARD))),
    )


def _step_seconds(pool: RankPool, ranks: int, overhead: Overhead, *, steps: int) -> float:
    """What a step takes besides sleeps and passes at this moment."""
    seconds = _calibration_run(pool, ranks, 1, MICROBATCHES, steps=steps)
    return max(1e-6, seconds - 4 * MICROBATCHES * overhead.pass_seconds)


def sleeping_model(costs: Mapping[str, Cost], overhead: Overhead) -> Model:
    """The planner's view of a sleeping model: sleeps are arithmetic on a device of known speed."""

    def costs_of(name: str, sizes: ResolvedParallelism, variant: Variant, samples: int) -> ModuleCosts:
        layers = _LAYERS if name == LANGUAGE else 1
        times = [samples * each / (sizes.tp * layers) for each in (costs[name].forward, costs[name].backward)]
        ends = [overhead.pass_seconds] * 2
        # Every stage has the overhead of a pass once; a stage has as many layers as the last stage of the same module.
        forward, backward = (_work(time + end * sizes.pp / layers) for time, end in zip(times, ends, strict=True))
        return ModuleCosts(
            module=name,
            num_layers=layers,
            layer=PartCosts(work=ModuleWork(forward=forward, backward=backward)),
            first=PartCosts(),
            last=PartCosts(work=_head(sizes.tp) if name == LANGUAGE else ModuleWork()),
            boundary_bytes=0,
            output_bytes=0,
        )

    return Model(
        costs=costs_of,
        global_batch_size=BATCH,
        tokens=6,
        dtype="float32",
        trains={"images": True, LANGUAGE: True},
    )


def _work(seconds: float) -> Work:
    return Work(operations={"matmul": Operations(flops=round(seconds * _PEAK), count=1)})


def _head(tp: int) -> ModuleWork:
    """The vocabulary-parallel head and loss, which compute nothing but speak with their tensor-parallel peers."""

    def messages(count: int) -> Work:
        return Work(
            messages=(Message(over="tp", operation="all_reduce", ranks=tuple(range(tp)), bytes=0, count=count),)
        )

    return ModuleWork(forward=messages(_MESSAGES_FORWARD), backward=messages(_MESSAGES_BACKWARD))


def hardware_of(overhead: Overhead) -> Hardware:
    """The device on which a sleep is arithmetic; messages are so small that they take their latency alone."""
    link = Link(bandwidth=1e9, latency=overhead.message_seconds / 2)  # an all-reduce of two ranks is two messages
    return Hardware(
        name="sleep",
        sources=(),
        devices_per_node=64,
        memory=2**30,
        flops={"float32": _PEAK},
        matmul_efficiency=1.0,
        attention_efficiency=1.0,
        memory_bandwidth=1e9,
        launch=1e-9,
        step_overhead=overhead.step_seconds,
        within_node=link,
        between_nodes=link,
    )


def predict(layout: MimoLayout, costs: Mapping[str, Cost], overhead: Overhead) -> float:
    """Seconds of a step, as the planner sees it."""
    candidate = Candidate(
        layout=layout,
        num_microbatches=MICROBATCHES,
        encoder_run_ahead=RUN_AHEAD,
        distributed_optimizer=False,
        overlap=False,
        variant=Variant(recompute=frozenset(), sequence_parallel=False),
    )
    model, hardware = sleeping_model(costs, overhead), hardware_of(overhead)
    return simulate_step(candidate, price_stages(candidate, model, hardware), model, hardware).seconds


def layouts_of(ranks: int) -> list[MimoLayout]:
    """All legal layouts whose replicas the microbatches divide over."""
    layouts = legal_layouts(DEGREES, world_size=ranks, global_batch_size=BATCH)
    return [each for each in layouts if all(BATCH % (MICROBATCHES * size.dp) == 0 for size in each.modules.values())]


def outcomes(
    pool: RankPool, share: float, ranks: int, overhead: Overhead, *, steps: int, at_most: int | None = None
) -> list[Outcome]:
    """Predict and measure the layouts of one model in one world."""
    costs = costs_of_model(share, ranks)
    found, before = [], overhead.step_seconds
    for layouts in itertools.batched(layouts_of(ranks)[:at_most], _LAYOUTS_BETWEEN):
        wait_until_quiet(pool)
        runs = [_measure(pool, layout, costs, MICROBATCHES, steps) for layout in layouts]
        after = _step_seconds(pool, ranks, overhead, steps=steps)
        around = replace(overhead, step_seconds=(before + after) / 2)
        before = after
        found += [
            Outcome(
                layout=_in_words(layout),
                ranks=ranks,
                predicted=predict(layout, costs, around),
                measured=statistics.median(measured),
                steps=tuple(measured),
                runs=times,
            )
            for layout, (measured, times) in zip(layouts, runs, strict=True)
        ]
    return found


def _in_words(layout: MimoLayout) -> str:
    parts = [
        f"{name} " + " ".join(f"{axis}={getattr(sizes, axis)}" for axis in ("tp", "pp", "dp"))
        for name, sizes in layout.modules.items()
    ]
    return ("colocated: " if layout.colocated else "") + ", ".join(parts)


def summary(name: str, ranks: int, found: Sequence[Outcome]) -> list[Cell]:
    """A row of the table: errors over all layouts, and the regret."""
    errors = [abs(each.predicted / each.measured - 1) for each in found]
    picked = min(found, key=lambda each: each.predicted)
    fastest = min(found, key=lambda each: each.measured)
    regret = picked.measured / fastest.measured - 1
    missed = statistics.mean(errors) > TARGET_ERROR or regret > TARGET_REGRET
    slowest = max(found, key=lambda each: each.measured)
    return [
        name,
        ranks,
        len(found),
        statistics.mean(errors),
        max(errors),
        regret,
        slowest.measured / fastest.measured,
        sum(each.runs - 1 for each in found),
        picked.layout,
        "missed" if missed else "",
    ]


def table(rows: Sequence[Sequence[Cell]], details: Mapping[str, Any]) -> Report:
    """The table of some rows."""
    return Report(
        title="Planner: predicted against measured seconds of a step",
        columns=(
            "encoder",
            "ranks",
            "layouts",
            "mean error",
            "largest",
            "regret",
            "spread",
            "repeated",
            "picked",
            "targets",
        ),
        rows=rows,
        notes=(
            f"Targets: mean error at most {TARGET_ERROR:.0%}, regret at most {TARGET_REGRET:.0%}.",
            "regret: how much slower the picked layout is, measured, than the fastest one measured.",
            "spread: the slowest layout over the fastest one, measured.",
            f"repeated: runs that were measured again because their steps differed by more than {_MOST_SPREAD:.0%}.",
        ),
        details=details,
    )


def measure(pool: RankPool, *, quick: bool, model: str | None = None) -> Report:
    """All models, or one of :data:`SHARES`.

    Raises:
        MachineBusyError: if other programs use the machine.
    """
    rows: list[list[Cell]] = []
    details: dict[str, Any] = {}
    models = {model: SHARES[model]} if model else dict(list(SHARES.items())[: 1 if quick else None])
    for ranks, (name, share) in itertools.product((2,) if quick else WORLDS, models.items()):
        wait_until_quiet(pool)
        overhead = calibrate(pool, ranks, steps=2 if quick else 5)
        found = outcomes(pool, share, ranks, overhead, steps=1 if quick else 3, at_most=2 if quick else None)
        rows.append(summary(name, ranks, found))
        print("  ".join(map(str, rows[-1])), flush=True)
        details[f"{name} encoder, {ranks} ranks"] = {"overhead": asdict(overhead), "layouts": list(map(asdict, found))}
    return table(rows, details)

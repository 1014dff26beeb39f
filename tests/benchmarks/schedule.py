"""How near the ranks come to a schedule in which communication is free.

Every module sleeps in the place of computing, so that ranks truly overlap on any number of cores; schedule, bridges,
process groups and Trainer are the real ones. The efficiency of a layout is the time of the ideal schedule, an event
simulation, over the time of a step under Trainer, from one batch to the next. A virtual machine whose host is busy
loses its cores now and then, and its kernel counts for how long: steps in which it did are told apart.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
from torch.utils.data import DataLoader

from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from tests.benchmarks.ideal import ideal_seconds
from tests.benchmarks.quiet import quiet_trainer
from tests.benchmarks.report import Cell, Report
from tests.benchmarks.sleeping import Cost, SleepingData, SleepingModule
from tests.parity.layouts import PoolEnvironment
from tests.support.rank_pool import RankPool

TARGET = 0.97
CALM = 0.01  # of a step's time that others may have had a core


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout and how long one pipeline stage of each module takes for a microbatch.

    Attributes:
        modules: the layout.
        costs: seconds of one stage for one microbatch.
        microbatches: of a step.
        encoder_run_ahead: as for MimoStrategy.
        uneven: how much longer than that encoders take for one microbatch and the next, over and over.
    """

    modules: Mapping[str, ModuleParallelism]
    costs: Mapping[str, Cost]
    microbatches: int = 8
    encoder_run_ahead: int = 1
    uneven: tuple[float, ...] = (1.0,)

    @property
    def layout(self) -> MimoLayout:
        ranks = sum((sizes.dp or 1) * sizes.ranks_per_replica for sizes in self.modules.values())
        return MimoLayout.resolve(dict(self.modules), world_size=ranks)

    @property
    def ideal(self) -> float:
        return ideal_seconds(
            self.layout,
            self.costs,
            num_microbatches=self.microbatches,
            encoder_run_ahead=self.encoder_run_ahead,
            uneven=self.uneven,
        )


def _cost(milliseconds: float) -> Cost:
    return Cost(forward=milliseconds / 3000, backward=milliseconds / 1500)


SHORT, EVEN, LONG = _cost(150), _cost(225), _cost(300)  # forward and backward together
CASES = {
    "balanced, pp=1": Case(
        modules={"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1)},
        costs={"images": EVEN, "language": EVEN},
    ),
    "encoder-bound, pp=1": Case(
        modules={"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1)},
        costs={"images": LONG, "language": SHORT},
    ),
    "language-bound, pp=1": Case(
        modules={"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1)},
        costs={"images": SHORT, "language": LONG},
    ),
    "fan-in dp 4 -> 2, tp=2": Case(
        modules={"images": ModuleParallelism(dp=4), "language": ModuleParallelism(dp=2, tp=2)},
        costs={"images": EVEN, "language": EVEN},
    ),
    "fan-out dp 1 -> 4": Case(
        modules={"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=4)},
        costs={"images": EVEN, "language": LONG},
    ),
    "balanced, language pp=2": Case(
        modules={"images": ModuleParallelism(dp=2), "language": ModuleParallelism(dp=1, pp=2)},
        costs={"images": EVEN, "language": EVEN},
    ),
    "encoder-bound, pp=2 and pp=2": Case(
        modules={"images": ModuleParallelism(dp=1, pp=2), "language": ModuleParallelism(dp=1, pp=2)},
        costs={"images": LONG, "language": SHORT},
    ),
    "language-bound, language pp=4": Case(
        modules={"images": ModuleParallelism(dp=2), "language": ModuleParallelism(dp=1, pp=4)},
        costs={"images": SHORT, "language": LONG},
    ),
    "balanced, pp=4 and pp=4": Case(
        modules={"images": ModuleParallelism(dp=1, pp=4), "language": ModuleParallelism(dp=1, pp=4)},
        costs={"images": EVEN, "language": EVEN},
    ),
    "two encoders, language pp=2": Case(
        modules={
            "images": ModuleParallelism(dp=2),
            "sounds": ModuleParallelism(dp=1),
            "language": ModuleParallelism(dp=1, pp=2),
        },
        costs={"images": EVEN, "sounds": SHORT, "language": EVEN},
    ),
    "two encoders, one pp=2, balanced": Case(
        modules={
            "images": ModuleParallelism(dp=1, pp=2),
            "sounds": ModuleParallelism(dp=1),
            "language": ModuleParallelism(dp=1),
        },
        costs={"images": EVEN, "sounds": LONG, "language": EVEN},
    ),
    "16 ranks, fan-in, tp=2 pp=4": Case(
        modules={"images": ModuleParallelism(dp=8), "language": ModuleParallelism(dp=1, tp=2, pp=4)},
        costs={"images": LONG, "language": LONG},
    ),
}
IMAGES_DIFFER = (0.5, 1.5, 1.0, 0.4, 1.6, 1.0, 1.7, 0.3)
UNEVEN = Case(
    modules={"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1)},
    costs={"images": EVEN, "language": EVEN},
    uneven=IMAGES_DIFFER,
)
CASES |= {f"uneven images, run-ahead {ahead}": replace(UNEVEN, encoder_run_ahead=ahead) for ahead in (0, 1, 2)}
QUICK = ("balanced, pp=1", "language-bound, language pp=4")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one rank saw of one step.

    Attributes:
        seconds: from one batch to the next.
        processor: seconds of this rank.
        stolen: seconds in which the machine's cores belonged to others, as far as its kernel knows.
        queued: seconds in which this rank could have gone on, but all cores were taken; 0 where no kernel tells.
    """

    seconds: float
    processor: float
    stolen: float
    queued: float

    @property
    def is_calm(self) -> bool:
        return self.stolen <= CALM * self.seconds


class _Steps(pl.Callback):
    def __init__(self) -> None:
        self.marks: list[Step] = []

    def on_train_batch_start(self, *_: Any) -> None:
        stolen = getattr(psutil.cpu_times(), "steal", 0.0)
        clocks = time.perf_counter(), time.process_time()
        self.marks.append(Step(seconds=clocks[0], processor=clocks[1], stolen=stolen, queued=_queued()))


def _queued() -> float:
    """Seconds that this thread has waited for a core so far, as Linux counts them."""
    file = Path("/proc/thread-self/schedstat")
    return int(file.read_text().split()[1]) / 1e9 if file.exists() else 0.0


def _train(case: Case, steps: int) -> list[Step]:
    """Train on this rank; the first step, which makes connections, is not among those that are returned."""
    layout = case.layout
    # A replica takes as long for its part of a microbatch as the case says for the whole: the sleeping modules multiply
    # by samples and divide by ranks.
    batch = case.microbatches * max(sizes.dp for sizes in layout.modules.values())
    costs = {
        name: Cost(forward=cost.forward * share, backward=cost.backward * share)
        for name, cost in case.costs.items()
        for sizes in [layout.modules[name]]
        for share in [sizes.tp * sizes.pp * sizes.dp * case.microbatches / batch]
    }
    timer = _Steps()
    strategy = MimoStrategy(
        dict(case.modules),
        batch,
        case.microbatches,
        encoder_run_ahead=case.encoder_run_ahead,
        cluster_environment=PoolEnvironment(),
    )
    trainer = quiet_trainer(strategy, max_steps=steps + 2, callbacks=[timer])
    data = SleepingData([name for name in case.modules if name != LANGUAGE])
    trainer.fit(SleepingModule(costs, uneven=case.uneven), DataLoader(data, batch_size=batch))
    strategy.infra.destroy()
    return [
        Step(**{name: value - getattr(begin, name) for name, value in asdict(end).items()})
        for begin, end in pairwise(timer.marks[1:])
    ]


def measure(pool: RankPool, *, quick: bool) -> Report:
    rows: list[list[Cell]] = []
    details = {}
    for name in QUICK if quick else CASES:
        case = CASES[name]
        ranks = pool.run(_train, case, 2 if quick else 10, world_size=case.layout.world_size, timeout=400)
        # A step is over for all when it is over for the last.
        steps = [max(step, key=lambda each: each.seconds) for step in zip(*ranks, strict=True)]
        calm = [case.ideal / step.seconds for step in steps if step.is_calm]
        efficiency = [case.ideal / step.seconds for step in steps]
        middle = statistics.median(calm or efficiency)
        shares, queued = (
            [sum(getattr(step, what) for step in rank) / sum(step.seconds for step in rank) for rank in ranks]
            for what in ("processor", "queued")
        )
        rows.append(
            [
                name,
                case.layout.world_size,
                case.ideal,
                middle,
                min(calm or efficiency),
                max(calm or efficiency),
                f"{len(calm)} of {len(steps)}",
                statistics.median(efficiency),
                max(shares),
                sum(shares) / (os.cpu_count() or 1),
                sum(queued) / len(queued),
                "" if middle >= TARGET else "missed",
            ]
        )
        details[name] = {"steps": [asdict(step) for step in steps], "ideal": case.ideal}
    return Report(
        title="Schedule efficiency: a step with free communication over the measured step",
        columns=(
            *(
                "layout",
                "ranks",
                "ideal s",
                "efficiency",
                "least",
                "most",
                "calm",
                "of all",
                "CPU / wall",
                "cores busy",
                "no core",
            ),
            f"target {TARGET}",
        ),
        rows=rows,
        notes=(
            f"Of calm steps, if there are any: others had less than {CALM:.0%} of the time on this machine's cores.",
            "of all: median of all steps. CPU / wall: of the busiest rank. cores busy: by all ranks, which wake up",
            "together and then wait for a core: no core is that part of the time, mean of the ranks' main threads.",
            "uneven images: microbatches take the encoder 0.3 to 1.7 of the mean; the ideal has the same run-ahead.",
        ),
        details=details,
    )

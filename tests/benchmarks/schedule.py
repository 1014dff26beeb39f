"""How near the ranks come to a schedule in which communication is free.

Every module sleeps in the place of computing, so that ranks truly overlap on any number of cores; schedule, bridges,
process groups and Trainer are the real ones. The efficiency of a layout is the time of the ideal schedule, an event
simulation, over the time of a step under Trainer, from one batch to the next.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_mimo import MimoStrategy
from lightning_mimo import ModuleParallelism as Cut
from lightning_mimo.layout import MimoLayout
from lightning_mimo.parallelism import LANGUAGE
from tests.benchmarks.ideal import ideal_seconds
from tests.benchmarks.report import Report
from tests.benchmarks.sleeping import Cost, SleepingData, SleepingModule
from tests.multiprocess.parity.layouts import PoolEnvironment
from tests.multiprocess.rank_pool import RankPool

TARGET = 0.97


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout and how long one pipeline stage of each module takes for a microbatch.

    Attributes:
        modules: the layout.
        costs: seconds of one stage for one microbatch.
        microbatches: of a step.
    """

    modules: Mapping[str, Cut]
    costs: Mapping[str, Cost]
    microbatches: int = 8

    @property
    def layout(self) -> MimoLayout:
        ranks = sum((sizes.dp or 1) * sizes.ranks_per_replica for sizes in self.modules.values())
        return MimoLayout.resolve(dict(self.modules), world_size=ranks)

    @property
    def ideal(self) -> float:
        return ideal_seconds(self.layout, self.costs, num_microbatches=self.microbatches)


def _cost(milliseconds: float) -> Cost:
    return Cost(forward=milliseconds / 3000, backward=milliseconds / 1500)


SHORT, EVEN, LONG = _cost(150), _cost(225), _cost(300)  # forward and backward together
CASES = {
    "balanced, pp=1": Case(
        modules={"images": Cut(dp=1), "language": Cut(dp=1)}, costs={"images": EVEN, "language": EVEN}
    ),
    "encoder-bound, pp=1": Case(
        modules={"images": Cut(dp=1), "language": Cut(dp=1)}, costs={"images": LONG, "language": SHORT}
    ),
    "language-bound, pp=1": Case(
        modules={"images": Cut(dp=1), "language": Cut(dp=1)}, costs={"images": SHORT, "language": LONG}
    ),
    "fan-in dp 4 -> 2, tp=2": Case(
        modules={"images": Cut(dp=4), "language": Cut(dp=2, tp=2)}, costs={"images": EVEN, "language": EVEN}
    ),
    "fan-out dp 1 -> 4": Case(
        modules={"images": Cut(dp=1), "language": Cut(dp=4)}, costs={"images": EVEN, "language": LONG}
    ),
    "balanced, language pp=2": Case(
        modules={"images": Cut(dp=2), "language": Cut(dp=1, pp=2)}, costs={"images": EVEN, "language": EVEN}
    ),
    "encoder-bound, pp=2 and pp=2": Case(
        modules={"images": Cut(dp=1, pp=2), "language": Cut(dp=1, pp=2)}, costs={"images": LONG, "language": SHORT}
    ),
    "language-bound, language pp=4": Case(
        modules={"images": Cut(dp=2), "language": Cut(dp=1, pp=4)}, costs={"images": SHORT, "language": LONG}
    ),
    "balanced, pp=4 and pp=4": Case(
        modules={"images": Cut(dp=1, pp=4), "language": Cut(dp=1, pp=4)}, costs={"images": EVEN, "language": EVEN}
    ),
    "two encoders, language pp=2": Case(
        modules={"images": Cut(dp=2), "sounds": Cut(dp=1), "language": Cut(dp=1, pp=2)},
        costs={"images": EVEN, "sounds": SHORT, "language": EVEN},
    ),
    "two encoders, one pp=2, balanced": Case(
        modules={"images": Cut(dp=1, pp=2), "sounds": Cut(dp=1), "language": Cut(dp=1)},
        costs={"images": EVEN, "sounds": LONG, "language": EVEN},
    ),
    "16 ranks, fan-in, tp=2 pp=4": Case(
        modules={"images": Cut(dp=8), "language": Cut(dp=1, tp=2, pp=4)}, costs={"images": LONG, "language": LONG}
    ),
}
QUICK = ("balanced, pp=1", "language-bound, language pp=4")


class _Steps(pl.Callback):
    def __init__(self) -> None:
        self.moments: list[tuple[float, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.moments.append((time.perf_counter(), time.process_time()))


def _train(case: Case, steps: int) -> tuple[list[float], float]:
    """Seconds of each step, and CPU time over wall time of this rank."""
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
    strategy = MimoStrategy(dict(case.modules), batch, case.microbatches, cluster_environment=PoolEnvironment())
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        max_steps=steps + 2,
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = SleepingData([name for name in case.modules if name != LANGUAGE])
    trainer.fit(SleepingModule(costs), DataLoader(data, batch_size=batch))
    strategy.infra.destroy()
    counted = timer.moments[1:]  # the first step makes connections
    seconds = [end[0] - begin[0] for begin, end in pairwise(counted)]
    return seconds, (counted[-1][1] - counted[0][1]) / (counted[-1][0] - counted[0][0])


def measure(pool: RankPool, *, quick: bool) -> Report:
    rows, details = [], {}
    for name in QUICK if quick else CASES:
        case = CASES[name]
        found = pool.run(_train, case, 2 if quick else 5, world_size=case.layout.world_size, timeout=400)
        # A step is over for all when it is over for the last.
        steps = [max(each) for each in zip(*(seconds for seconds, _ in found), strict=True)]
        efficiency = [case.ideal / seconds for seconds in steps]
        middle = statistics.median(efficiency)
        busiest = max(share for _, share in found)
        rows.append(
            (
                name,
                case.layout.world_size,
                case.ideal,
                middle,
                min(efficiency),
                max(efficiency),
                busiest,
                "" if middle >= TARGET else "missed",
            )
        )
        details[name] = {"seconds": steps, "ideal": case.ideal}
    return Report(
        title="Schedule efficiency: a step with free communication over the measured step",
        columns=("layout", "ranks", "ideal s", "efficiency", "least", "most", "CPU / wall", f"target {TARGET}"),
        rows=rows,
        notes=("CPU / wall: of the busiest rank; below 0.3 the cores do not limit what is measured.",),
        details=details,
    )

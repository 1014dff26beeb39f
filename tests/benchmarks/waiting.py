"""How long ranks wait for data, with samples divided by their costs and in order, packed and padded.

Two replicas, one worker each. What the strategy spends in asking
the loader is added up, early or when the batch is due. Both sides of a row train on as many samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, Dataset

from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.data.prefetch import LoadsAhead
from tests.benchmarks.balance import MODULES, Case, CostlyData, drawn
from tests.benchmarks.packing import IN_A_ROW, Llama, Texts
from tests.benchmarks.paired import compare
from tests.benchmarks.quiet import quiet_trainer
from tests.benchmarks.report import Cell, Report
from tests.benchmarks.sleeping import Cost, SleepingModule
from tests.parity.layouts import PoolEnvironment
from tests.support.rank_pool import RankPool

CASE = Case(images=2, language=2, colocate=True)
COST = Cost(forward=0.006, backward=0.012)  # of a sample of mean cost, of either module
REPLICAS = 2
FIRST = 3  # steps in which workers start


class _Waits:
    """Seconds between one batch and the next in which this rank is inside of its loader."""

    def __init__(self) -> None:
        self.seconds: list[float] = [0.0]

    def timed(self, method: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(batches: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(batches)
            finally:
                self.seconds[-1] += time.perf_counter() - began
                if method is _NEXT:
                    self.seconds.append(0.0)

        return call


_NEXT, _AHEAD = LoadsAhead.__next__, LoadsAhead.load_ahead


def _wait_of_a_step(strategy: MimoStrategy, module: LightningModule, dataset: Dataset, batch: int) -> float:
    """Median over the steps of an epoch, in seconds, on this rank."""
    waits = _Waits()
    with (
        patch.object(LoadsAhead, "__next__", waits.timed(_NEXT)),
        patch.object(LoadsAhead, "load_ahead", waits.timed(_AHEAD)),
    ):
        trainer = quiet_trainer(strategy, max_epochs=1)
        trainer.fit(module, DataLoader(dataset, batch_size=batch, num_workers=1))
    strategy.infra.destroy()
    return statistics.median(waits.seconds[FIRST:-2])


def balanced(steps: int, balance: bool) -> float:
    """Modules that sleep 18 ms for a sample of mean cost."""
    costs = drawn(CASE.batch * steps, seed=0)
    modules = {name: ModuleParallelism(dp=dp) for name, dp in CASE.dp_sizes.items()}
    strategy = MimoStrategy(modules, CASE.batch, colocate=True, balance=balance, cluster_environment=PoolEnvironment())
    module = SleepingModule(dict.fromkeys(MODULES, COST), work=costs["language"])
    return _wait_of_a_step(strategy, module, CostlyData(costs), CASE.batch)


def packed(steps: int, packs: bool) -> float:
    """A small Llama, 16 samples or a row of about as many a replica."""
    texts = Texts(REPLICAS * IN_A_ROW * steps)
    batch = REPLICAS * (1 if packs else IN_A_ROW)
    strategy = MimoStrategy(
        {"language": ModuleParallelism(dp=REPLICAS)},
        batch,
        pack_to=texts.budget if packs else None,
        cluster_environment=PoolEnvironment(),
    )
    return _wait_of_a_step(strategy, Llama(), texts, batch)


def measure(pool: RankPool, *, quick: bool) -> Report:
    steps, rounds = (8, 1) if quick else (16, 4)
    rows: list[list[Cell]] = []
    details: dict[str, Any] = {}
    for name, wait in (("balanced / in order", balanced), ("packed / padded", packed)):

        def block(option: bool, wait: Callable[[int, bool], float] = wait) -> float:
            return max(pool.run(wait, steps, option, world_size=REPLICAS, timeout=400))

        found = compare(partial(block, True), partial(block, False), rounds=rounds)
        spread = min(found.differences), max(found.differences)
        milliseconds = [1000 * float(np.median(each)) for each in (found.a, found.b)]
        rows.append([name, *milliseconds, 1000 * found.difference, *(1000 * each for each in spread), *found.control])
        details[name] = {"first": found.a, "second": found.b}
    return Report(
        title="Milliseconds of a step in which a rank waits for data, 2 ranks with a worker each",
        columns=("what", "first, ms", "second, ms", "first - second, ms", "from", "to", "control from", "to"),
        rows=rows,
        notes=(
            "Median of the steps, of the rank that waits longer, in rounds of A B B A. Differences: median, least and",
            "most of the rounds; control: ratios of neighbouring blocks of the same.",
        ),
        details=details,
    )

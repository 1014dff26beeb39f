"""How much longer the slowest replica works than the mean, with the samples of a batch divided by their costs or not.

Costs are lognormal with sigma 0.8, drawn for each module by itself. On up to 8 ranks, modules sleep for as long as
their samples cost, under Trainer; the same batches are run with balance and without, in turn. For more replicas the
same code divides the samples, and what a replica would work is added up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.data.balance import balanced_order
from lightning_mimo.data.sample_costs import SampleCosts
from lightning_mimo.layout.layout import MimoLayout
from tests.benchmarks.paired import compare
from tests.benchmarks.quiet import quiet_trainer
from tests.benchmarks.report import Cell, Report
from tests.benchmarks.sleeping import Cost, SleepingData, SleepingModule
from tests.parity.layouts import PoolEnvironment
from tests.support.rank_pool import RankPool

SIGMA, MODULES = 0.8, ("images", "language")
TARGETS = {2: 1.1, 4: 1.1, 8: 1.1, 32: 1.2}
COST = Cost(forward=0.018, backward=0.036)  # of a sample of mean cost, of either module


@dataclass(frozen=True, kw_only=True)
class Case:
    """Modules that sleep; the ones with most replicas have ``per_replica`` samples of a global batch for each."""

    images: int
    language: int
    colocate: bool = False
    per_replica: int = 8

    @property
    def dp_sizes(self) -> dict[str, int]:
        return {"images": self.images, "language": self.language}

    @property
    def batch(self) -> int:
        return max(self.images, self.language) * self.per_replica

    @property
    def ranks(self) -> int:
        modules = {name: ModuleParallelism(dp=dp) for name, dp in self.dp_sizes.items()}
        ranks = max(self.dp_sizes.values()) if self.colocate else sum(self.dp_sizes.values())
        return MimoLayout.resolve(modules, world_size=ranks, colocate=self.colocate).world_size


CASES = {
    "colocated, dp 2": Case(images=2, language=2, colocate=True),
    "images dp 2, language dp 2": Case(images=2, language=2),
    "images dp 4 -> language dp 2": Case(images=4, language=2),
    "images dp 4, language dp 4": Case(images=4, language=4),
    "colocated, dp 8": Case(images=8, language=8, colocate=True),
    "colocated, dp 8, 16 samples": Case(images=8, language=8, colocate=True, per_replica=16),
}
QUICK = ("colocated, dp 2",)


class CostlyData(SleepingData):
    """Samples of one item each, which says how long the encoder sleeps for it."""

    def __init__(self, costs: Mapping[str, np.ndarray]) -> None:
        super().__init__(["images"], length=len(costs["images"]))
        self._costs = {name: each.tolist() for name, each in costs.items()}

    def load(self, index: int, modules: frozenset[str]) -> dict[str, Any]:
        sample = super().load(index, modules)
        for inputs in sample["modality_inputs"].values():
            inputs["encoder"]["input"] = torch.full((1, 1), self._costs["images"][index])
        return sample

    def cost(self, index: int) -> dict[str, float]:
        return {name: each[index] for name, each in self._costs.items()}


class _Watch(pl.Callback):
    """When batches began, and the imbalance that telemetry reports."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.imbalance: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.began.append(time.perf_counter())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        found = [trainer.callback_metrics.get(f"telemetry/{name}/imbalance") for name in MODULES]
        if all(each is not None for each in found):
            self.imbalance.append(max(map(float, found)))


def _train(case: Case, steps: int, balance: bool) -> tuple[list[float], float]:
    """Seconds of each step but the first on this rank, and the mean over steps of the worst module's imbalance."""
    costs = drawn(case.batch * (steps + 2), seed=0)
    watch = _Watch()
    strategy = MimoStrategy(
        {name: ModuleParallelism(dp=dp) for name, dp in case.dp_sizes.items()},
        case.batch,
        colocate=case.colocate,
        balance=balance,
        cluster_environment=PoolEnvironment(),
    )
    trainer = quiet_trainer(strategy, max_steps=steps + 2, callbacks=[watch], log_every_n_steps=1)
    module = SleepingModule(dict.fromkeys(MODULES, COST), work=costs["language"])
    trainer.fit(module, DataLoader(CostlyData(costs), batch_size=case.batch))
    strategy.infra.destroy()
    return [end - begin for begin, end in pairwise(watch.began[1:])], float(np.mean(watch.imbalance[1:]))


def drawn(samples: int, *, seed: int, modules: tuple[str, ...] = MODULES) -> dict[str, np.ndarray]:
    """Lognormal costs with a mean of 1."""
    random = np.random.default_rng(seed)
    return {name: np.exp(SIGMA * random.standard_normal(samples) - SIGMA**2 / 2) for name in modules}


def by_costs(case: Case, steps: int, balance: bool) -> float:
    """Seconds of the steps if only sleeping took time: a replica of either module waits for those it exchanges with."""
    costs, columns, seconds = drawn(case.batch * (steps + 2), seed=0), max(case.dp_sizes.values()), 0.0
    for step in range(1, steps + 1):
        own = {name: each[step * case.batch : (step + 1) * case.batch] for name, each in costs.items()}
        order = _order(own, case.dp_sizes) if balance else np.arange(case.batch)
        work = [np.repeat(own[n][order].reshape(dp, -1).sum(axis=1), columns // dp) for n, dp in case.dp_sizes.items()]
        seconds += sum(work).max() * (COST.forward + COST.backward)
    return seconds


def _order(costs: Mapping[str, np.ndarray], dp_sizes: Mapping[str, int]) -> np.ndarray:
    return balanced_order(costs, dp_sizes=dp_sizes, num_microbatches=1, padded=frozenset())


def _run(pool: RankPool, name: str, case: Case, *, steps: int, rounds: int) -> tuple[list[Cell], Any]:
    imbalance: dict[bool, list[float]] = {True: [], False: []}

    def block(balance: bool) -> Callable[[], float]:
        def run() -> float:
            ranks = pool.run(_train, case, steps, balance, world_size=case.ranks, timeout=400)
            imbalance[balance].append(ranks[0][1])
            # A step is over for all when it is over for the last.
            return sum(max(step) for step in zip(*(seconds for seconds, _ in ranks), strict=True))

        return run

    comparison = compare(block(True), block(False), rounds=rounds)
    on, off = np.mean(imbalance[True]), np.mean(imbalance[False])
    expected = by_costs(case, steps, True) / by_costs(case, steps, False)
    replicas = max(case.dp_sizes.values())
    row = [name, replicas, case.per_replica, float(off), float(on), None, _missed(replicas, float(on))]
    a, b = np.median(comparison.a) / steps, np.median(comparison.b) / steps
    return [*row, float(b), float(a), comparison.ratio, expected, None], {"on": comparison.a, "off": comparison.b}


def _simulated(replicas: int, per_replica: int, modules: tuple[str, ...], batches: int) -> list[Cell]:
    dp_sizes, samples = dict.fromkeys(modules, replicas), replicas * per_replica
    costs = drawn(samples * batches, seed=1, modules=modules)
    dataset = CostlyData({**dict.fromkeys(MODULES, costs[modules[0]]), **costs})
    read = SampleCosts(lambda index: dataset.cost(index), name="CostlyData", modules=MODULES)
    off, on, bound, seconds = [], [], [], 0.0
    for batch in range(batches):
        begin = time.thread_time()
        own = read.of(range(batch * samples, (batch + 1) * samples))
        order = _order({name: own[name] for name in modules}, dp_sizes)
        seconds += time.thread_time() - begin
        off.append(max(_slowest(own[name], replicas) for name in modules))
        on.append(max(_slowest(own[name][order], replicas) for name in modules))
        bound.append(max(_least(own[name], replicas) for name in modules))
    mean = float(np.mean(on))
    name = f"by the costs, {len(modules)} module{'s' * (len(modules) > 1)}"
    row = [name, replicas, per_replica, float(np.mean(off)), mean, float(np.mean(bound)), _missed(replicas, mean)]
    return [*row, None, None, None, None, 1e6 * seconds / (samples * batches)]


def _slowest(costs: np.ndarray, replicas: int) -> float:
    work = costs.reshape(replicas, -1).sum(axis=1)
    return float(work.max() / work.mean())


def _least(costs: np.ndarray, replicas: int) -> float:
    """What no order can go below: the largest sample together with the smallest ones."""
    ordered, others = np.sort(costs), len(costs) // replicas - 1
    return max(1.0, float((ordered[-1] + ordered[:others].sum()) / (costs.sum() / replicas)))


def _missed(replicas: int, found: float) -> Cell:
    return "missed" if found > TARGETS.get(replicas, math.inf) else ""


def measure(pool: RankPool, *, quick: bool) -> Report:
    rows: list[list[Cell]] = []
    details = {}
    for name in QUICK if quick else CASES:
        row, details[name] = _run(pool, name, CASES[name], steps=2 if quick else 8, rounds=1)
        rows.append(row)
    for modules in (("images",), MODULES):
        for replicas in (8, 32) if quick else (8, 32, 128, 512):
            for per_replica in (8, 16):
                rows.append(_simulated(replicas, per_replica, modules, 2 if quick else max(5, 1600 // replicas)))
    return Report(
        title="Even work: the slowest replica over the mean of a step, lognormal costs with sigma 0.8",
        columns=(
            *("case", "replicas", "samples", "off", "on", "possible", "1.1 at 8, 1.2 at 32"),
            *("step off s", "step on s", "on / off", "expected", "µs a sample"),
        ),
        rows=rows,
        notes=(
            "off, on: slowest replica over mean, mean over steps, of the worse module; of ranks as telemetry has it,",
            "or added up from the costs. samples: of a replica. possible: no order of equal numbers of samples goes",
            "below. expected: on / off if sleeping alone took time. µs a sample: processor time of reading its cost",
            "and of ordering.",
        ),
        details=details,
    )

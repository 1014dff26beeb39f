"""What each rank decodes, over what its modules need; and whether loading hides behind the step.

A dataset counts what it is asked for, in seven layouts. Another one sleeps while it loads, and the steps of a sleeping
model are compared with those of the same training whose dataset does not sleep.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.data.loader import shard_dataloader
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from tests.benchmarks.paired import Comparison, compare
from tests.benchmarks.quiet import quiet_trainer
from tests.benchmarks.report import Cell, Report
from tests.benchmarks.sleeping import Cost, SleepingData, SleepingModule
from tests.parity.layouts import Layout, PoolEnvironment
from tests.support.rank_pool import RankPool

BATCH, STEPS = 16, 4
LAYOUTS = {
    "images_dp4-language_dp1 (fan-in)": Layout(
        modules={"images": ModuleParallelism(dp=4), "language": ModuleParallelism(dp=1)}
    ),
    "images_dp1-language_dp4 (fan-out)": Layout(
        modules={"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=4)}
    ),
    "images_tp2dp2-language_tp2": Layout(
        modules={"images": ModuleParallelism(tp=2, dp=2), "language": ModuleParallelism(tp=2, dp=1)}
    ),
    "images_dp2-language_pp2, 4 microbatches": Layout(
        modules={"images": ModuleParallelism(dp=2), "language": ModuleParallelism(pp=2, dp=1)}, num_microbatches=4
    ),
    "images_pp2-language_pp2, 4 microbatches": Layout(
        modules={"images": ModuleParallelism(pp=2, dp=1), "language": ModuleParallelism(pp=2, dp=1)}, num_microbatches=4
    ),
    "images_dp2-audio_dp1-language_tp2": Layout(
        modules={
            "images": ModuleParallelism(dp=2),
            "audio": ModuleParallelism(dp=1),
            "language": ModuleParallelism(tp=2, dp=1),
        }
    ),
    "colocated images_dp4-language_tp2dp2": Layout(
        modules={"images": ModuleParallelism(dp=4), "language": ModuleParallelism(tp=2, dp=2)}, colocate=True
    ),
}

HIDDEN = Layout(modules={"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2, dp=1)})
HIDDEN_BATCH = 8
COSTS = {"images": Cost(forward=0.002, backward=0.004), "language": Cost(forward=0.012, backward=0.024)}
# An encoder replica sleeps 4 * 6 ms, the language module 8 * 36 ms / tp=2: a step takes 168 ms and what Python takes.
WAIT = 0.144  # seconds of it in which encoders wait for their gradients
SHORT, LONG = 0.02, 0.1  # seconds to load one image, 4 of them in a batch of each encoder rank: 80 ms and 400 ms
IMAGES = 4
MANY = 16  # microbatches


class Counting(SleepingData):
    """Counts what it is asked for, in this process, and takes its time over every item."""

    def __init__(self, encoders: list[str], *, length: int, seconds: float = 0.0) -> None:
        super().__init__(encoders, length=length)
        self.counts: Counter[str] = Counter()
        self._seconds = seconds

    def load(self, index: int, modules: frozenset[str]) -> dict[str, Any]:
        sample = super().load(index, modules)
        self.counts["samples"] += 1
        self.counts.update(sample["modality_inputs"].keys())
        if self._seconds:
            time.sleep(self._seconds * len(sample["modality_inputs"]))
        return sample


class Moments(pl.Callback):
    """When each batch had been trained on."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())


def _fit(
    layout: Layout, costs: Mapping[str, Cost], dataset: Counting, *, batch: int, num_workers: int = 0
) -> list[float]:
    """Train on a dataset once; when each step was done."""
    strategy = MimoStrategy(
        dict(layout.modules),
        batch,
        layout.num_microbatches,
        colocate=layout.colocate,
        cluster_environment=PoolEnvironment(),
    )
    moments = Moments()
    trainer = quiet_trainer(strategy, max_epochs=1, callbacks=[moments])
    trainer.fit(SleepingModule(costs), DataLoader(dataset, batch_size=batch, num_workers=num_workers))
    strategy.infra.destroy()
    return moments.ends


def _count(layout: Layout) -> Counter[str]:
    encoders = [name for name in layout.modules if name != LANGUAGE]
    costs = dict.fromkeys([*encoders, LANGUAGE], Cost(forward=0.0, backward=0.0))
    dataset = Counting(encoders, length=BATCH * STEPS)
    _fit(layout, costs, dataset, batch=BATCH)
    return dataset.counts


def _seconds_per_step(seconds: float, num_workers: int, steps: int) -> float:
    """Median time of a step on this rank; the first three, in which workers start, are not counted."""
    dataset = Counting(["images"], length=HIDDEN_BATCH * steps, seconds=seconds)
    ends = _fit(HIDDEN, COSTS, dataset, batch=HIDDEN_BATCH, num_workers=num_workers)
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(ends[2:]))


def _needed(layout: Layout, rank: int) -> Counter[str]:
    """What one rank has to load in all steps. Only the first pipeline stage of an encoder looks at its items."""
    resolved = MimoLayout.resolve(layout.modules, world_size=layout.ranks, colocate=layout.colocate)
    names = resolved.modules_on(rank)
    share = {name: BATCH * STEPS // resolved.modules[name].dp for name in names}
    first = [name for name in names if name != LANGUAGE and resolved.modules[name].coordinates(rank)["pp"] == 0]
    return Counter({"samples": max(share.values()), **{name: share[name] for name in first}})


def _counted(pool: RankPool, name: str, layout: Layout) -> list[list[Cell]]:
    counts = pool.run(_count, layout, world_size=layout.ranks)
    needed = [_needed(layout, rank) for rank in range(layout.ranks)]
    encoders = [encoder for encoder in layout.modules if encoder != LANGUAGE]
    samples = [counts[rank]["samples"] / needed[rank]["samples"] for rank in range(layout.ranks)]
    each = [(rank, encoder) for rank in range(layout.ranks) for encoder in encoders]
    items = [counts[rank][name] / needed[rank][name] for rank, name in each if needed[rank][name]]
    unneeded = [counts[rank][name] / (BATCH * STEPS) for rank, name in each if not needed[rank][name]]
    rows: list[list[Cell]] = [
        ["samples loaded / needed, all ranks", name, statistics.median(samples), min(samples), max(samples), "1"],
        ["items decoded / needed, ranks that encode them", name, statistics.median(items), min(items), max(items), "1"],
    ]
    if unneeded:
        what = "items decoded on other ranks / items of the data"
        rows.append([what, name, statistics.median(unneeded), min(unneeded), max(unneeded), "0"])
    return rows


def _compared(pool: RankPool, slow: tuple[float, int], *, steps: int, rounds: int) -> Comparison:
    """Training whose dataset sleeps, and with workers, against one whose dataset does not."""

    def block(seconds: float, num_workers: int) -> float:
        found = pool.run(_seconds_per_step, seconds, num_workers, steps, world_size=HIDDEN.ranks)
        return max(found)

    return compare(partial(block, *slow), partial(block, 0.0, 0), rounds=rounds)


class _Unpacked:
    """A collate function whose tensors go to the rank one by one."""

    def __init__(self, collate: Callable[[Any], list[Any]]) -> None:
        self._collate = collate

    def __call__(self, loaded: Any) -> list[Any]:
        return list(self._collate(loaded))


def _taking(rounds: int) -> Comparison:
    """Seconds in which this process takes batches that lie ready, in one process."""
    layout = MimoLayout.resolve({LANGUAGE: ModuleParallelism()}, world_size=1)
    plan = RankBatchPlan.build(layout, 0, global_batch_size=4 * MANY, num_microbatches=MANY)

    def block(packed: bool) -> float:
        loader = DataLoader(SleepingData([]), batch_size=4 * MANY, num_workers=1)
        loader = shard_dataloader(
            loader, plan, sample_format=SampleFormat(special_token_ids={}, pad_token_id=0), seed=1
        )
        if not packed:
            loader.collate_fn = _Unpacked(loader.collate_fn)
        batches, taken = iter(loader), []
        for _ in range(8):
            time.sleep(0.1)
            began = time.perf_counter()
            next(batches)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[2:])

    return compare(partial(block, True), partial(block, False), rounds=rounds)


def measure(pool: RankPool, *, quick: bool) -> Report:
    rows = [row for name, layout in LAYOUTS.items() for row in _counted(pool, name, layout)]
    details: dict[str, Any] = {}
    steps, rounds = (8, 1) if quick else (10, 2)
    name = "images_dp2-language_tp2"
    for seconds, num_workers in ((0.0, 1), (SHORT, 0), (SHORT, 1), (LONG, 1), (LONG, 2)):
        found = _compared(pool, (seconds, num_workers), steps=steps, rounds=rounds)
        step, load = statistics.median(found.b), IMAGES * seconds
        # A worker loads one batch after the other, beside the steps; a rank without one, while it waits for others.
        target = max(1.0, load / (num_workers * step)) if num_workers else 1 + max(0.0, load - WAIT) / step
        what = f"step, loading takes {load * 1000:.0f} ms, {num_workers} workers / step, it takes none"
        rows.append([what, name, found.ratio, min(found.ratios), max(found.ratios), f"{target:.2f}", *found.control])
        details[what] = {"slow": found.a, "fast": found.b}
    found = pool.run(_taking, 2 * rounds, world_size=1)[0]
    what = f"take a batch of {MANY} microbatches from a worker: in one tensor / each in its own"
    rows.append([what, "language_dp1", found.ratio, min(found.ratios), max(found.ratios), None, *found.control])
    details[what] = {"one": found.a, "own": found.b}
    rows = [[*row, *[None] * (8 - len(row))] for row in rows]
    return Report(
        title="Loading: what each rank decodes, and what of it the step has to wait for",
        columns=("ratio", "layout", "median", "least", "most", "target", "control from", "to"),
        rows=rows,
        notes=(
            "Counts: over ranks. Steps: over the rounds of A B B A; control: neighbouring blocks of the same training.",
            "Without a worker a rank loads the next batch where it waits for others first.",
        ),
        details=details,
    )

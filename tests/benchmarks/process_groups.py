"""How many process groups a layout has, and how long they take, from 2 to 16 ranks.

Compared are the groups that this package shares and one for each combination of axes, as HyperCommGrid makes them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid

from lightning_mimo import MimoLayout, MimoModelInfra, ModuleParallelism
from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.layout.module_parallelism import DENSE_AXES, EXPERT_AXES
from lightning_mimo.parallel.infra import _DENSE_GROUPS, _EXPERT_GROUPS
from lightning_mimo.parallel.process_groups import EXPERT_VIEW
from tests.benchmarks.paired import Comparison, compare
from tests.benchmarks.report import Report
from tests.support.rank_pool import RankPool

SIZES = (2, 4, 8, 16)
LANGUAGE: dict[str, Callable[[int], ModuleParallelism]] = {  # half of the ranks -> how the language module lies on them
    "dp": lambda half: ModuleParallelism(dp=half),
    "tp": lambda half: ModuleParallelism(tp=half, dp=1),
    "pp": lambda half: ModuleParallelism(pp=half, dp=1),
    "tp dp pp": lambda half: ModuleParallelism(tp=min(2, half), dp=2 if half > 2 else 1, pp=2 if half > 4 else 1),
}


def _unshared(layout: MimoLayout) -> list[HyperCommGrid]:
    grids = []
    for sizes in layout.modules.values():
        grid = HyperCommGrid(list(sizes.shape), list(DENSE_AXES), rank_offset=sizes.rank_offset)
        grid.register_view(EXPERT_VIEW, list(sizes.expert_shape), list(EXPERT_AXES), shared_dims=["pp"])
        for axes in _DENSE_GROUPS.values():
            grid.create_pg(axes)
        for axes in _EXPERT_GROUPS.values():
            grid.create_pg(axes, view=EXPERT_VIEW)
        grids.append(grid)
    return grids


class _Builds:
    """Makes the groups of a layout and takes them down, and remembers how many there were."""

    def __init__(self, layout: MimoLayout) -> None:
        self._layout = layout
        self.counts: dict[str, list[int]] = {}

    def shared(self) -> float:
        with megatron_on_cpu():  # as in a run: groups also share what waits for data
            infra, seconds = self._timed("shared", lambda: MimoModelInfra.build(self._layout))
        infra.destroy()
        return seconds

    def unshared(self) -> float:
        grids, seconds = self._timed("unshared", lambda: _unshared(self._layout))
        for grid in grids:
            grid.destroy()
        return seconds

    def _timed[T](self, name: str, build: Callable[[], T]) -> tuple[T, float]:
        """What was built, and the seconds of the slowest rank."""
        world = dist.distributed_c10d._world
        dist.barrier()
        before = torch.tensor([len(world.pg_map), world.group_count, _threads()])
        began = time.perf_counter()
        built = build()
        seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        counts = torch.tensor([len(world.pg_map), world.group_count, _threads()]) - before
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        self.counts.setdefault(name, counts.tolist())
        return built, float(seconds)


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def _compare(modules: Mapping[str, ModuleParallelism], rounds: int) -> tuple[Comparison, dict[str, list[int]]]:
    builds = _Builds(MimoLayout.resolve(modules, world_size=dist.get_world_size()))
    return compare(builds.shared, builds.unshared, rounds=rounds), builds.counts


def measure(pool: RankPool, *, quick: bool) -> Report:
    rows, notes = [], []
    for name, cut in LANGUAGE.items():
        medians: dict[str, list[float]] = {"shared": [], "unshared": []}
        for ranks in SIZES:
            modules = {"images": ModuleParallelism(dp=ranks // 2), "language": cut(ranks // 2)}
            compared, counts = pool.run(_compare, modules, 1 if quick else 5, world_size=ranks, timeout=400)[0]
            shared, unshared = _median(compared.a), _median(compared.b)
            medians["shared"].append(shared)
            medians["unshared"].append(unshared)
            spread = f"{min(compared.ratios):.2f} to {max(compared.ratios):.2f}"
            control = "{:.2f} to {:.2f}".format(*compared.control)
            numbers = [f"{b} -> {a}" for a, b in zip(counts["shared"], counts["unshared"], strict=True)]
            rows.append((name, ranks, *numbers, unshared, shared, compared.ratio, spread, control))
        laws = [f"{how} {power_law(SIZES, seconds)}" for how, seconds in medians.items()]
        notes.append(f"{name}: seconds grow with ranks as {', '.join(laws)}")
    return Report(
        title="Process groups: one for each combination of axes, and shared where ranks are the same",
        columns=(
            "language", "ranks", "of a rank", "in all", "threads", "unshared s", "shared s", "ratio", "from, to", "A/A"
        ),
        rows=rows,
        notes=(
            "images: dp over half of the ranks; language: the other half. Seconds of the slowest rank, medians.",
            "of a rank, threads: the most over the ranks. in all: dist.new_group calls, which every rank makes.",
            *notes,
        ),
    )  # fmt: skip


def power_law(sizes: tuple[int, ...], values: list[float]) -> str:
    """``n^k`` through the points, by least squares of the logarithms, and how far the farthest point is from it."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    power = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    off = max(abs(b - mean_y - power * (a - mean_x)) for a, b in zip(x, y, strict=True))
    return f"n^{power:.2f} (within a factor of {math.exp(off):.2f})"


def _median(values: tuple[float, ...]) -> float:
    return sorted(values)[len(values) // 2]

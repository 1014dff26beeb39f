"""Finds the fastest layouts: every legal one with every setting, simulated unless a lower bound shows that it loses.

Layouts are taken in the order of a lower bound on their step, and so are the settings of each. The search ends when the
next bound is above the slowest plan that is kept, so the result is that of pricing everything.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_mimo.errors import ConfigError, LayoutError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.planning.candidate import Candidate, Model, Variant
from lightning_mimo.planning.hardware import Hardware
from lightning_mimo.planning.layouts import Degrees, legal_layouts, microbatch_numbers, worlds_that_fit
from lightning_mimo.planning.pricing import StagePrice, memory_by_stage, peak_memory, price_module
from lightning_mimo.planning.simulation import Simulation
from lightning_mimo.planning.step import simulate_step

RUN_AHEAD = (0, 1, 2, 4)
"""Values of encoder_run_ahead that are tried."""
USABLE = 0.92
"""Share of a device's memory that a plan may fill; the rest is for CUDA, communicators and fragmentation."""
_SAME = 1e-3  # plans whose steps differ by less than this part are taken for equally fast


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a search may choose from.

    Attributes:
        degrees: module name -> sizes that it supports, in the order of the ranks.
        variants: settings of the model.
        distributed_optimizer: values to try.
        overlap: whether gradients are reduced during the last backward pass.
    """

    degrees: Mapping[str, Degrees]
    variants: tuple[Variant, ...]
    distributed_optimizer: tuple[bool, ...] = (True, False)
    overlap: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A candidate with its price.

    Attributes:
        candidate: layout and settings.
        prices: of its stages.
        simulation: of a step, with equal samples.
        memory: stage -> peak bytes on a rank.
    """

    candidate: Candidate
    prices: Sequence[StagePrice]
    simulation: Simulation
    memory: Mapping[str, int]

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.simulation.seconds


@dataclass(frozen=True, kw_only=True)
class Found:
    """Outcome of a search.

    Attributes:
        plans: the fastest ones, the best first; of one layout only the best settings.
        layouts: number of legal layouts.
        priced: number of layouts with settings that were priced; a lower bound ruled out the others.
        too_large: how many of them do not fit the memory.
        simulated: how many steps were simulated.
    """

    plans: Sequence[Plan]
    layouts: int
    priced: int
    too_large: int
    simulated: int


def search(space: Space, model: Model, hardware: Hardware, *, world_size: int, memory: float, keep: int = 5) -> Found:
    """Find the fastest layouts.

    Args:
        space: what to choose from.
        model: costs and batches.
        hardware: devices and links.
        world_size: number of devices.
        memory: bytes of a device.
        keep: number of layouts to return.

    Raises:
        LayoutError: if no layout fills the devices.
        ConfigError: if the model fits in none; says what would make it fit.
    """
    layouts = list(legal_layouts(space.degrees, world_size=world_size, global_batch_size=model.global_batch_size))
    if not layouts:
        raise LayoutError(_no_layout(space, model, world_size))
    run = _Search(space, model, hardware, memory=USABLE * memory, keep=keep)
    plans = run.best_of(layouts)
    if not plans:
        if run.smallest is None:
            raise LayoutError(
                f"--gpus={world_size}: the model supports none of the {len(layouts)} layouts. {run.refused}"
            )
        raise ConfigError(_fits_nowhere(*run.smallest, memory=memory, hardware=hardware, world_size=world_size))
    return Found(
        plans=plans,
        layouts=len(layouts),
        priced=run.priced,
        too_large=run.too_large,
        simulated=run.simulated,
    )


class _Search:
    """One search, with the prices of modules that it has computed.

    Attributes:
        priced: candidates that were priced.
        too_large: how many of them do not fit.
        simulated: steps that were simulated.
        smallest: bytes and candidate of the one that needs the least memory of those that do not fit.
        refused: why a candidate cannot be built.
    """

    def __init__(self, space: Space, model: Model, hardware: Hardware, *, memory: float, keep: int) -> None:
        self._space, self._model, self._hardware, self._memory, self._keep = space, model, hardware, memory, keep
        self._prices: dict[tuple[object, ...], tuple[StagePrice, ...] | LayoutError] = {}
        self._best: dict[tuple[object, ...], Plan] = {}
        self.priced = self.too_large = self.simulated = 0
        self.smallest: tuple[float, Candidate] | None = None
        self.refused: LayoutError | None = None

    def best_of(self, layouts: Sequence[MimoLayout]) -> list[Plan]:
        """The fastest plans of some layouts, the best first."""
        numbers = itertools.count()
        heap: list[tuple[float, int, MimoLayout | None, Candidate | None]] = [
            (self._least_of(layout), next(numbers), layout, None) for layout in layouts
        ]
        heapq.heapify(heap)
        while heap:
            bound, _, layout, candidate = heapq.heappop(heap)
            if bound >= self._limit():
                break
            if layout is not None:
                for each in self._candidates(layout):
                    heapq.heappush(heap, (self._bound(each), next(numbers), None, each))
            elif candidate is not None:
                self._try(candidate)
        return sorted(self._best.values(), key=lambda plan: plan.seconds)[: self._keep]

    def _bound(self, candidate: Candidate) -> float:
        return lower_bound(candidate, self._priced(candidate), self._model.trains)

    def _limit(self) -> float:
        """Seconds of the slowest plan that is kept."""
        if len(self._best) < self._keep:
            return math.inf
        return sorted(plan.seconds for plan in self._best.values())[self._keep - 1]

    def _least_of(self, layout: MimoLayout) -> float:
        """A lower bound for all settings of a layout, from the arithmetic of the fastest variant alone."""
        fastest = math.inf
        for variant in _fastest(self._space.variants):
            for number in microbatch_numbers(layout, global_batch_size=self._model.global_batch_size):
                candidate = self._candidate(layout, number, variant, distributed=self._space.distributed_optimizer[0])
                try:
                    prices = self._priced(candidate)
                except LayoutError:
                    continue
                work = [number * (price.forward + price.backward) for price in prices]
                fastest = min(fastest, sum(work) if layout.colocated else max(work))
        return fastest

    def _candidates(self, layout: MimoLayout) -> Iterator[Candidate]:
        """The settings of a layout that fit the memory, with the smallest run-ahead."""
        for number in microbatch_numbers(layout, global_batch_size=self._model.global_batch_size):
            for variant in _distinct(self._space.variants, layout):
                for distributed in self._space.distributed_optimizer:
                    candidate = self._candidate(layout, number, variant, distributed=distributed)
                    try:
                        prices = self._priced(candidate)
                    except LayoutError as error:
                        self.refused = error
                        continue
                    self.priced += 1
                    needed = peak_memory(candidate, prices)
                    if needed <= self._memory:
                        yield candidate
                        continue
                    self.too_large += 1
                    if self.smallest is None or needed < self.smallest[0]:
                        self.smallest = needed, candidate

    def _candidate(self, layout: MimoLayout, number: int, variant: Variant, *, distributed: bool) -> Candidate:
        return Candidate(
            layout=layout,
            num_microbatches=number,
            encoder_run_ahead=RUN_AHEAD[0],
            distributed_optimizer=distributed,
            overlap=self._space.overlap,
            variant=variant,
        )

    def _priced(self, candidate: Candidate) -> list[StagePrice]:
        """Prices of all stages; those of a module are computed once for all layouts in which it runs alike.

        Raises:
            LayoutError: if the model supports a combination of sizes and settings not.
        """
        found: list[StagePrice] = []
        for name, sizes in candidate.layout.modules.items():
            node = self._hardware.devices_per_node
            place = sizes.rank_offset % node, (sizes.rank_offset + sizes.size - 1) // node == sizes.rank_offset // node
            variant = name in candidate.variant.recompute, candidate.variant.sequence_parallel
            settings = candidate.num_microbatches, *variant, candidate.distributed_optimizer
            key = (name, sizes.shape, sizes.ep, sizes.expt_tp, place, settings)
            if key not in self._prices:
                try:
                    self._prices[key] = price_module(candidate, name, self._model, self._hardware)
                except LayoutError as error:
                    self._prices[key] = error
            prices = self._prices[key]
            if isinstance(prices, LayoutError):
                raise prices
            found += prices
        return found

    def _try(self, candidate: Candidate) -> None:
        """Simulate a candidate with every run-ahead that fits, as long as it gets faster."""
        prices = self._priced(candidate)
        apart = not candidate.layout.colocated and len(candidate.layout.modules) > 1
        before, bound = math.inf, self._bound(candidate)
        for run_ahead in RUN_AHEAD if apart else RUN_AHEAD[1:2]:
            ahead = replace(candidate, encoder_run_ahead=run_ahead)
            if run_ahead and apart and peak_memory(ahead, prices) > self._memory:
                break
            self.simulated += 1
            simulation = simulate_step(ahead, prices, self._model, self._hardware)
            if simulation.seconds > (1 - _SAME) * before:
                break
            before = simulation.seconds
            memory = memory_by_stage(ahead, prices)
            self._keep_better(Plan(candidate=ahead, prices=prices, simulation=simulation, memory=memory))
            if before <= (1 + _SAME) * bound:
                break

    def _keep_better(self, plan: Plan) -> None:
        layout = plan.candidate.layout
        shapes = [(*sizes.shape, sizes.ep, sizes.expt_tp) for sizes in layout.modules.values()]
        key = (layout.colocated, *shapes)
        if key not in self._best or _is_better(plan, self._best[key]):
            self._best[key] = plan


def _is_better(one: Plan, two: Plan) -> bool:
    """Faster, or as fast with less memory."""
    if abs(one.seconds - two.seconds) > _SAME * two.seconds:
        return one.seconds < two.seconds
    return max(one.memory.values()) < max(two.memory.values())


def _distinct(variants: Sequence[Variant], layout: MimoLayout) -> list[Variant]:
    """The variants that differ in a layout: without tensor parallelism there is no sequence parallelism."""
    if layout.modules[LANGUAGE].tp > 1:
        return list(variants)
    same = variants[0].sequence_parallel
    return list(dict.fromkeys(replace(variant, sequence_parallel=same) for variant in variants))


def _fastest(variants: Sequence[Variant]) -> list[Variant]:
    """The variants that recompute least: recomputation never makes a step faster, it only saves memory."""
    return [
        one
        for one in variants
        if not any(two.recompute < one.recompute and two.sequence_parallel == one.sequence_parallel for two in variants)
    ]


def lower_bound(candidate: Candidate, prices: Sequence[StagePrice], trains: Mapping[str, bool]) -> float:
    """Seconds that a step takes at least: the passes of one stage without a pause, and what goes before and after.

    Args:
        candidate: layout and settings.
        prices: of its stages.
        trains: module name -> whether gradients are sent back through it.
    """
    number = candidate.num_microbatches
    if candidate.layout.colocated:
        work = number * sum(price.forward + price.backward for price in prices)
        return work + sum(price.last_bucket for price in prices) + sum(price.update for price in prices)
    longest = first = last = 0.0
    by_module = {name: [p for p in prices if p.module == name] for name in candidate.layout.modules}
    for name in [*candidate.layout.encoders, LANGUAGE]:
        # The first microbatch must have come through the stages before, and the last gradient goes back through them.
        before, after = (first, last) if name == LANGUAGE else (0.0, 0.0)
        for price in by_module[name]:
            work = number * (price.forward + price.backward)
            longest = max(longest, before + work + max(price.last_bucket, after))
            before += price.forward
            after += price.backward if trains[name] else 0.0
        if name != LANGUAGE:
            first, last = max(first, before), max(last, after)
    return longest + max(price.update for price in prices)


def _no_layout(space: Space, model: Model, world_size: int) -> str:
    near = worlds_that_fit(space.degrees, world_size=world_size, global_batch_size=model.global_batch_size)
    return (
        f"--gpus={world_size}: no layout of {', '.join(space.degrees)} fills them with "
        f"global_batch_size={model.global_batch_size}, whose divisors every dp must be. "
        + (f"Layouts fill {' or '.join(map(str, near))} GPUs." if near else "Choose another global_batch_size.")
    )


def _fits_nowhere(needed: float, candidate: Candidate, *, memory: float, hardware: Hardware, world_size: int) -> str:
    """Say how much the smallest candidate needs and what would make it fit."""
    gib = 2**30
    return (
        f"--gpus={world_size}: the model fits in no layout into {memory / gib:.1f} GiB of a {hardware.name}, of which "
        f"{USABLE:.0%} may be filled. The smallest needs {needed / gib:.1f} GiB ({candidate}). Use more GPUs, "
        f"--memory={math.ceil(needed / USABLE / gib)}GiB or more, a smaller model, or freeze a part of it."
    )

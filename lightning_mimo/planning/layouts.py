"""Every legal layout of a model on a number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lightning_mimo.errors import LayoutError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE, ModuleParallelism, dp_step_of_experts


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Parallel sizes that a module supports, each tried on its own.

    Attributes:
        tp: tensor-parallel sizes.
        pp: numbers of pipeline stages.
        ep: expert-parallel sizes.
    """

    tp: tuple[int, ...] = (1,)
    pp: tuple[int, ...] = (1,)
    ep: tuple[int, ...] = (1,)


def legal_layouts(degrees: Mapping[str, Degrees], *, world_size: int, global_batch_size: int) -> Iterator[MimoLayout]:
    """Yield every layout that fills all ranks, first colocated ones, then those with modules on ranks of their own.

    A layout is legal if :meth:`MimoLayout.resolve` accepts it and the global batch divides over its replicas.

    Args:
        degrees: module name -> sizes that the module supports, in the order of the ranks.
        world_size: number of ranks.
        global_batch_size: samples of a global batch.
    """
    yield from _resolved(_colocated(degrees, world_size, global_batch_size), world_size, colocate=True)
    apart = _apart(degrees, world_size, global_batch_size)
    if len(degrees) == 1:  # a module alone is colocated unless it has pipeline stages
        apart = (sizes for sizes in apart if sizes[LANGUAGE].pp > 1)
    yield from _resolved(apart, world_size, colocate=False)


def microbatch_numbers(layout: MimoLayout, *, global_batch_size: int) -> list[int]:
    """All numbers of microbatches for which the global batch divides over every module."""
    samples = global_batch_size // math.lcm(*(sizes.dp for sizes in layout.modules.values()))
    return divisors(samples)


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, in ascending order."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]


def worlds_that_fit(degrees: Mapping[str, Degrees], *, world_size: int, global_batch_size: int) -> list[int]:
    """The numbers of ranks closest to ``world_size``, one below and one above, for which there is a legal layout."""

    def fits(ranks: int) -> bool:
        return next(legal_layouts(degrees, world_size=ranks, global_batch_size=global_batch_size), None) is not None

    below = next((n for n in range(world_size - 1, 0, -1) if fits(n)), None)
    above = next((n for n in range(world_size + 1, 2 * world_size + 64) if fits(n)), None)
    return [n for n in (below, above) if n is not None]


def _resolved(
    candidates: Iterator[dict[str, ModuleParallelism]], world_size: int, *, colocate: bool
) -> Iterator[MimoLayout]:
    for modules in candidates:
        try:
            yield MimoLayout.resolve(modules, world_size=world_size, colocate=colocate)
        except LayoutError:
            continue


def _replicas(degrees: Degrees) -> Iterator[ModuleParallelism]:
    """Every shape of a replica, without dp."""
    for tp in degrees.tp:
        for pp in degrees.pp:
            for ep in degrees.ep:
                yield ModuleParallelism(tp=tp, pp=pp, ep=ep)


def _colocated(
    degrees: Mapping[str, Degrees], world_size: int, global_batch_size: int
) -> Iterator[dict[str, ModuleParallelism]]:
    choices = {
        name: [
            replace(replica, dp=dp)
            for replica in _replicas(replace(each, pp=(1,)))
            if world_size % replica.tp == 0 and global_batch_size % (dp := world_size // replica.tp) == 0
        ]
        for name, each in degrees.items()
    }
    yield from _combinations(choices)


def _combinations(choices: Mapping[str, list[ModuleParallelism]]) -> Iterator[dict[str, ModuleParallelism]]:
    """All combinations in which the dp of every encoder nests with that of the language module."""
    encoders = [name for name in choices if name != LANGUAGE]

    def extend(chosen: dict[str, ModuleParallelism], rest: list[str]) -> Iterator[dict[str, ModuleParallelism]]:
        if not rest:
            yield {name: chosen[name] for name in choices}
            return
        for sizes in choices[rest[0]]:
            if _nests(sizes.replicas, chosen[LANGUAGE].replicas):
                yield from extend({**chosen, rest[0]: sizes}, rest[1:])

    for language in choices[LANGUAGE]:
        yield from extend({LANGUAGE: language}, encoders)


def _apart(
    degrees: Mapping[str, Degrees], world_size: int, global_batch_size: int
) -> Iterator[dict[str, ModuleParallelism]]:
    encoders = [name for name in degrees if name != LANGUAGE]
    batch = divisors(global_batch_size)

    def fill(
        chosen: dict[str, ModuleParallelism], rest: list[str], ranks: int
    ) -> Iterator[dict[str, ModuleParallelism]]:
        if not rest:
            if ranks == 0:
                yield {name: chosen[name] for name in degrees}
            return
        name, *others = rest
        language = chosen.get(LANGUAGE)
        for replica in _replicas(degrees[name]):
            for dp in batch:
                used = dp * replica.ranks_per_replica
                if used > ranks - len(others):
                    break
                if not others and used != ranks:
                    continue
                if dp % dp_step_of_experts(replica) or (language and not _nests(dp, language.replicas)):
                    continue
                yield from fill({**chosen, name: replace(replica, dp=dp)}, others, ranks - used)

    yield from fill({}, [LANGUAGE, *encoders], world_size)


def _nests(one: int, two: int) -> bool:
    return one % two == 0 or two % one == 0

"""Fills in omitted values of a layout: the ``dp`` and the ``rank_offset`` of every module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from lightning_mimo.errors import LayoutError
from lightning_mimo.layout.module_parallelism import (
    LANGUAGE,
    ModuleParallelism,
    dp_step_of_experts,
    fitting_trainer,
    product_of,
)


def share_all_ranks(modules: Mapping[str, ModuleParallelism], world_size: int) -> dict[str, ModuleParallelism]:
    """Place every module on all ranks. An omitted dp is chosen so that the module fills them."""
    complete = {}
    for name, sizes in modules.items():
        if sizes.rank_offset not in (None, 0):
            raise LayoutError(
                f"Module {name!r} has rank_offset={sizes.rank_offset}, but colocate=True puts every module on all "
                f"ranks from 0. Leave rank_offset out, or leave colocate out."
            )
        if len(modules) > 1:
            check_no_pipeline(name, sizes)
        replicas, rest = divmod(world_size, sizes.ranks_per_replica)
        if rest:
            replica = replace(sizes, dp=None)
            raise LayoutError(
                f"Module {name!r}: {product_of(replica)} = {sizes.ranks_per_replica} ranks per replica do not divide "
                f"the {world_size} ranks that colocate=True gives it. Choose a tp that divides {world_size}, or leave "
                f"dp out everywhere and run with {_runs_that_all_fill(modules, world_size)}."
            )
        complete[name] = replace(sizes, dp=replicas if sizes.dp is None else sizes.dp, rank_offset=0)
        if (size := complete[name].size) != world_size:
            remedy = f"Set dp={replicas}, or leave dp out so that it fills the ranks"
            if all(_fills(other, size) for other in modules.values()):
                remedy += f", or run with {fitting_trainer(size)}"
            raise LayoutError(
                f"Module {name!r}: {product_of(complete[name])} = {size} ranks, but colocate=True puts it on all "
                f"{world_size}. {remedy}."
            )
    return complete


def _fills(sizes: ModuleParallelism, ranks: int) -> bool:
    return sizes.size == ranks if sizes.dp is not None else ranks % sizes.ranks_per_replica == 0


def _runs_that_all_fill(modules: Mapping[str, ModuleParallelism], world_size: int) -> str:
    """The numbers of ranks closest to ``world_size`` that replicas of every module fill exactly."""
    step = math.lcm(*(sizes.ranks_per_replica for sizes in modules.values()))
    below = world_size // step * step
    return f"{' or '.join(str(n) for n in (below, below + step) if n)} ranks (devices * num_nodes)"


def place_one_after_another(modules: Mapping[str, ModuleParallelism], world_size: int) -> dict[str, ModuleParallelism]:
    """Place modules on consecutive ranks, except those with a ``rank_offset``. An omitted dp uses the free ranks."""
    open_names = [name for name, sizes in modules.items() if sizes.dp is None]
    filled = dict(modules)
    if len(open_names) == 1:
        filled[open_names[0]] = _fill_dp(open_names[0], modules, world_size)
    elif open_names:
        filled = _fill_open(open_names, modules, world_size)
    complete: dict[str, ModuleParallelism] = {}
    end = 0
    for name, sizes in filled.items():
        placed = sizes if sizes.rank_offset is not None else replace(sizes, rank_offset=end)
        complete[name] = placed
        end = placed.resolved().ranks.stop
    return complete


def _fill_dp(name: str, modules: Mapping[str, ModuleParallelism], world_size: int) -> ModuleParallelism:
    """Return the only module whose dp was omitted with the dp that uses all remaining ranks."""
    sizes = modules[name]
    others = {other: m.size for other, m in modules.items() if other != name}
    left = world_size - sum(others.values())
    dp, rest = divmod(left, sizes.ranks_per_replica)
    if left > 0 and rest == 0:
        return replace(sizes, dp=dp)
    taken = " + ".join(f"{other} {size}" for other, size in others.items()) or "0"
    smallest = sum(others.values()) + sizes.ranks_per_replica * dp_step_of_experts(sizes)
    raise LayoutError(
        f"Module {name!r}: {world_size} ranks - ({taken}) leaves {left}, which is not a positive multiple of "
        f"{product_of(sizes)} = {sizes.ranks_per_replica} ranks per replica. The smallest run that fits is "
        f"{fitting_trainer(smallest)}."
    )


def _fill_open(
    open_names: list[str], modules: Mapping[str, ModuleParallelism], world_size: int
) -> dict[str, ModuleParallelism]:
    """Return all modules with every omitted dp filled in, if exactly one choice uses all ranks."""
    names = " and ".join(map(repr, open_names))
    smallest = {
        name: replace(sizes, dp=dp_step_of_experts(sizes)) if sizes.dp is None else sizes
        for name, sizes in modules.items()
    }
    needed = sum(sizes.size for sizes in smallest.values())
    if needed > world_size:
        table = " + ".join(f"{name} {sizes.size}" for name, sizes in smallest.items())
        raise LayoutError(
            f"dp is left out for {names}; the smallest choice already takes {table} = {needed} ranks, but there are "
            f"{world_size}. Run with {fitting_trainer(needed)}, or make a module smaller."
        )
    ways = [way for way in _ways_to_fill(open_names, smallest, world_size - needed) if _nests(way)]
    if not ways:
        raise LayoutError(
            f"dp is left out for {names}, and no choice takes all {world_size} ranks with dp sizes that divide one "
            f"another. The smallest run that fits is {fitting_trainer(needed)}."
        )
    if len(ways) > 1:
        choices = "; ".join(", ".join(f"{name} dp={way[name].dp}" for name in open_names) for way in ways[:3])
        raise LayoutError(
            f"dp is left out for {names}, so how {world_size} ranks are to be divided between them is ambiguous. "
            f"Give dp for all of these except one. Possible: {choices}{'; …' if len(ways) > 3 else ''}."
        )
    return ways[0]


def _ways_to_fill(
    open_names: list[str], modules: Mapping[str, ModuleParallelism], spare: int
) -> Iterator[dict[str, ModuleParallelism]]:
    """Yield every way to distribute ``spare`` ranks over the open modules, each in multiples of its smallest size."""
    if not open_names:
        if spare == 0:
            yield dict(modules)
        return
    first, *others = open_names
    sizes = modules[first]
    for times in range(1 + spare // sizes.size):
        larger = replace(sizes, dp=sizes.replicas * (1 + times))
        yield from _ways_to_fill(others, {**modules, first: larger}, spare - times * sizes.size)


def _nests(modules: Mapping[str, ModuleParallelism]) -> bool:
    language = modules[LANGUAGE].replicas
    return all(sizes.replicas % language == 0 or language % sizes.replicas == 0 for sizes in modules.values())


def check_no_pipeline(name: str, sizes: ModuleParallelism) -> None:
    """Raise LayoutError for pipeline stages in a colocated layout, which does not support them."""
    if sizes.pp > 1:
        raise LayoutError(
            f"Module {name!r}: pp={sizes.pp} does not work where modules share all ranks, because megatron-core runs a "
            f"colocated model without a pipeline. Set pp=1 and tp={sizes.tp * sizes.pp}, which takes as many ranks, or "
            f"put modules on ranks of their own."
        )

"""Which module sits on which ranks, with which axis sizes: pure data, checked before any process exists.

The user writes one :class:`ModuleParallelism` per module. :meth:`MimoLayout.resolve` fills in what was left
out (``dp``, ``rank_offset``) for a given number of ranks and refuses what cannot run, with an error that names
the module, shows the arithmetic and gives the remedy. Nothing here imports torch, so a layout can be checked on
a login node in milliseconds, and every rank comes to the same verdict without talking to the others.

Ranks of one module are numbered tp fastest, then cp, then dp, then pp: the ``tp-cp-dp-pp`` order of
megatron-core's ``initialize_model_parallel``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from types import MappingProxyType

LANGUAGE = "language"
"""Name of the one module that every layout must have; megatron-core's ``MIMO_LANGUAGE_MODULE_KEY``."""

DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("expt_tp", "ep", "expt_dp", "pp")


class LayoutError(ValueError):
    """A layout or a batch size that cannot run. The message says which number to change."""


@dataclass(frozen=True, kw_only=True)
class ModuleParallelism:
    """How one module is cut over its own ranks.

    Args:
        tp: tensor-parallel size.
        cp: context-parallel size. Only 1 is supported: the bridges between modules do not split sequences.
        pp: number of pipeline stages. Must be 1 where modules are colocated.
        dp: number of data-parallel replicas. ``None`` takes what is left over.
        ep: expert-parallel size (mixture-of-experts layers).
        expt_tp: tensor-parallel size inside one expert.
        rank_offset: first global rank of the module. ``None`` places it right after the module written before.
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int | None = None
    ep: int = 1
    expt_tp: int = 1
    rank_offset: int | None = None

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that one data-parallel replica takes: tp * cp * pp."""
        return self.tp * self.cp * self.pp

    @property
    def size(self) -> int:
        """Ranks that the module takes: tp * cp * dp * pp. Only known once ``dp`` is."""
        assert self.dp is not None, "dp is filled in by MimoLayout.resolve"
        return self.ranks_per_replica * self.dp

    @property
    def ranks(self) -> range:
        """Global ranks of the module. Only known once ``dp`` and ``rank_offset`` are."""
        assert self.rank_offset is not None, "rank_offset is filled in by MimoLayout.resolve"
        return range(self.rank_offset, self.rank_offset + self.size)

    @property
    def expt_dp(self) -> int:
        """Data-parallel replicas of one expert: tp * cp * dp / (expt_tp * ep)."""
        return self.size // (self.expt_tp * self.ep * self.pp)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sizes of the dense axes, in the order of ``DENSE_AXES``."""
        assert self.dp is not None, "dp is filled in by MimoLayout.resolve"
        return (self.tp, self.cp, self.dp, self.pp)

    @property
    def expert_shape(self) -> tuple[int, int, int, int]:
        """Sizes of the expert axes, in the order of ``EXPERT_AXES``."""
        return (self.expt_tp, self.ep, self.expt_dp, self.pp)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Index of a global rank along each dense axis, e.g. ``{"tp": 1, "cp": 0, "dp": 0, "pp": 1}``."""
        assert rank in self.ranks, f"rank {rank} is not in {self.ranks}"
        rest = rank - self.ranks.start
        place = {}
        for axis, size in zip(DENSE_AXES, self.shape, strict=True):
            rest, place[axis] = divmod(rest, size)
        return place


@dataclass(frozen=True, kw_only=True)
class MimoLayout:
    """A checked layout: every module with its ``dp`` and ``rank_offset`` known. Build it with :meth:`resolve`.

    Attributes:
        modules: module name -> complete :class:`ModuleParallelism`, in the order in which they were written.
        world_size: number of ranks over all nodes.
        colocated: True where all modules share all ranks, False where their rank ranges are disjoint.
    """

    modules: Mapping[str, ModuleParallelism]
    world_size: int
    colocated: bool

    @classmethod
    def resolve(
        cls, modules: Mapping[str, ModuleParallelism], *, world_size: int, colocate: bool = False
    ) -> MimoLayout:
        """Fill in what was left out and check the whole.

        Args:
            modules: module name -> sizes. One of them must be called ``language``.
            world_size: devices per node * number of nodes.
            colocate: put every module on all ranks instead of one after the other.

        Raises:
            LayoutError: if the layout cannot run; the message names the module and the remedy.
        """
        _check_names(modules)
        for name, sizes in modules.items():
            _check_sizes(name, sizes)
        complete = _share_all_ranks(modules, world_size) if colocate else _place_one_after_another(modules, world_size)
        colocated = _check_coverage(complete, world_size)
        for name, sizes in complete.items():
            if colocated:
                _check_no_pipeline(name, sizes)
            _check_bridge(name, complete, colocated=colocated)
        for name in complete:
            _check_experts(name, complete, colocated=colocated)
        return cls(modules=MappingProxyType(complete), world_size=world_size, colocated=colocated)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of all modules but ``language``."""
        return tuple(name for name in self.modules if name != LANGUAGE)

    def modules_on(self, rank: int) -> tuple[str, ...]:
        """Names of the modules that a global rank takes part in."""
        return tuple(name for name, sizes in self.modules.items() if rank in sizes.ranks)


def fitting_trainer(world_size: int) -> str:
    """The Trainer arguments that give ``world_size`` ranks, for error messages."""
    text = f"devices={world_size}"
    for devices in (8, 4, 2):
        if world_size > devices and world_size % devices == 0:
            return f"{text}, or devices={devices} with num_nodes={world_size // devices}"
    return text


def _check_names(modules: Mapping[str, ModuleParallelism]) -> None:
    if LANGUAGE not in modules:
        raise LayoutError(
            f"No module is called {LANGUAGE!r}; the layout has {', '.join(map(repr, modules)) or 'no modules'}. "
            f"Call the module that computes the loss {LANGUAGE!r}: all the others feed their embeddings to it."
        )
    for name in modules:
        if not isinstance(name, str) or not name.isidentifier():
            raise LayoutError(
                f"Module name {name!r} is not usable: it becomes part of parameter names, so it must be a Python "
                f"identifier such as 'images' or 'audio'."
            )


def _check_sizes(name: str, sizes: ModuleParallelism) -> None:
    if not isinstance(sizes, ModuleParallelism):
        raise LayoutError(
            f"Module {name!r} is described by a {type(sizes).__name__}; write ModuleParallelism(tp=..., dp=...)."
        )
    for field in fields(sizes):
        value = getattr(sizes, field.name)
        if value is None and field.name in ("dp", "rank_offset"):
            continue
        least = 0 if field.name == "rank_offset" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise LayoutError(f"Module {name!r}: {field.name}={value!r} must be a whole number of at least {least}.")
    if sizes.cp > 1:
        raise LayoutError(
            f"Module {name!r}: cp={sizes.cp} is not supported, because the bridges between modules exchange whole "
            f"samples and cannot cut a sequence. Set cp=1 and tp={sizes.tp * sizes.cp}, which takes as many ranks."
        )


def _share_all_ranks(modules: Mapping[str, ModuleParallelism], world_size: int) -> dict[str, ModuleParallelism]:
    complete = {}
    for name, sizes in modules.items():
        if sizes.rank_offset not in (None, 0):
            raise LayoutError(
                f"Module {name!r} has rank_offset={sizes.rank_offset}, but colocate=True puts every module on all "
                f"ranks from 0. Leave rank_offset out, or leave colocate out."
            )
        if len(modules) > 1:
            _check_no_pipeline(name, sizes)
        replicas, rest = divmod(world_size, sizes.ranks_per_replica)
        if rest:
            replica = replace(sizes, dp=None)
            raise LayoutError(
                f"Module {name!r}: {_product(replica)} = {sizes.ranks_per_replica} ranks a replica does not divide "
                f"the {world_size} ranks that colocate=True gives it. Choose a tp that divides {world_size}, or leave "
                f"dp out everywhere and run with {_runs_that_all_fill(modules, world_size)}."
            )
        complete[name] = replace(sizes, dp=replicas if sizes.dp is None else sizes.dp, rank_offset=0)
        if (size := complete[name].size) != world_size:
            remedy = f"Set dp={replicas}, or leave dp out to have it fill the ranks"
            if all(_fills(other, size) for other in modules.values()):
                remedy += f", or run with {fitting_trainer(size)}"
            raise LayoutError(
                f"Module {name!r}: {_product(complete[name])} = {size} ranks, but colocate=True puts it on all "
                f"{world_size}. {remedy}."
            )
    return complete


def _fills(sizes: ModuleParallelism, ranks: int) -> bool:
    return sizes.size == ranks if sizes.dp is not None else ranks % sizes.ranks_per_replica == 0


def _runs_that_all_fill(modules: Mapping[str, ModuleParallelism], world_size: int) -> str:
    """The numbers of ranks next to ``world_size`` that replicas of every module fill exactly."""
    step = math.lcm(*(sizes.ranks_per_replica for sizes in modules.values()))
    below = world_size // step * step
    return f"{' or '.join(str(n) for n in (below, below + step) if n)} ranks (devices * num_nodes)"


def _place_one_after_another(modules: Mapping[str, ModuleParallelism], world_size: int) -> dict[str, ModuleParallelism]:
    open_names = [name for name, sizes in modules.items() if sizes.dp is None]
    filled = dict(modules)
    if len(open_names) == 1:
        filled[open_names[0]] = _fill_dp(open_names[0], modules, world_size)
    elif open_names:
        filled = _fill_open(open_names, modules, world_size)
    complete, end = {}, 0
    for name, sizes in filled.items():
        placed = sizes if sizes.rank_offset is not None else replace(sizes, rank_offset=end)
        complete[name] = placed
        end = placed.ranks.stop
    return complete


def _fill_dp(name: str, modules: Mapping[str, ModuleParallelism], world_size: int) -> ModuleParallelism:
    """The one module whose dp was left out, with the dp that takes what the others leave."""
    sizes = modules[name]
    others = {other: m.size for other, m in modules.items() if other != name}
    left = world_size - sum(others.values())
    dp, rest = divmod(left, sizes.ranks_per_replica)
    if left > 0 and rest == 0:
        return replace(sizes, dp=dp)
    taken = " + ".join(f"{other} {size}" for other, size in others.items()) or "0"
    smallest = sum(others.values()) + sizes.ranks_per_replica * _dp_step_of_experts(sizes)
    raise LayoutError(
        f"Module {name!r}: {world_size} ranks - ({taken}) leaves {left}, which is not a positive multiple of "
        f"{_product(sizes)} = {sizes.ranks_per_replica} ranks a replica. The smallest run that fits is "
        f"{fitting_trainer(smallest)}."
    )


def _fill_open(
    open_names: list[str], modules: Mapping[str, ModuleParallelism], world_size: int
) -> dict[str, ModuleParallelism]:
    """All modules, where several dp were left out and just one way of filling them in takes all ranks."""
    names = " and ".join(map(repr, open_names))
    smallest = {
        name: replace(sizes, dp=_dp_step_of_experts(sizes)) if sizes.dp is None else sizes
        for name, sizes in modules.items()
    }
    needed = sum(sizes.size for sizes in smallest.values())
    if needed > world_size:
        table = " + ".join(f"{name} {sizes.size}" for name, sizes in smallest.items())
        raise LayoutError(
            f"dp is left out for {names}; already the smallest takes {table} = {needed} ranks, but there are "
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
            f"dp is left out for {names}, so how {world_size} ranks are to be divided between them is not determined. "
            f"Give dp for all of these but one. Possible: {choices}{'; …' if len(ways) > 3 else ''}."
        )
    return ways[0]


def _ways_to_fill(
    open_names: list[str], modules: Mapping[str, ModuleParallelism], spare: int
) -> Iterator[dict[str, ModuleParallelism]]:
    """Every way to hand ``spare`` further ranks to the open modules, each in steps of its smallest size."""
    if not open_names:
        if spare == 0:
            yield dict(modules)
        return
    first, *others = open_names
    sizes = modules[first]
    for times in range(1 + spare // sizes.size):
        larger = replace(sizes, dp=sizes.dp * (1 + times))
        yield from _ways_to_fill(others, {**modules, first: larger}, spare - times * sizes.size)


def _nests(modules: Mapping[str, ModuleParallelism]) -> bool:
    language = modules[LANGUAGE].dp
    return all(sizes.dp % language == 0 or language % sizes.dp == 0 for sizes in modules.values())


def _check_coverage(complete: Mapping[str, ModuleParallelism], world_size: int) -> bool:
    """Return whether the layout is colocated; raise if ranks are left over, missing or shared in part."""
    spans = {name: sizes.ranks for name, sizes in complete.items()}
    table = ", ".join(f"{name} {_product(complete[name])} on ranks {_span(span)}" for name, span in spans.items())
    for (one, a), (two, b) in combinations(spans.items(), 2):
        if a != b and max(a.start, b.start) < min(a.stop, b.stop):
            raise LayoutError(
                f"Modules {one!r} (ranks {_span(a)}) and {two!r} (ranks {_span(b)}) share some ranks but not all. "
                f"Ranges must be identical (colocate=True) or disjoint (leave rank_offset out)."
            )
    distinct = set(spans.values())
    if len(distinct) not in (1, len(spans)):
        raise LayoutError(
            f"Some modules share their ranks and others do not ({table}). Mixed layouts are not supported: put all "
            f"modules on all ranks (colocate=True), or each on ranks of its own (leave rank_offset out)."
        )
    needed = max(span.stop for span in spans.values())
    if gaps := [rank for rank in range(needed) if not any(rank in span for span in spans.values())]:
        total = sum(sizes.size for sizes in complete.values())
        raise LayoutError(
            f"{_belong(gaps)} to no module ({table}). Every rank must work: close the gap between the rank_offsets, or "
            f"leave them out and run with {fitting_trainer(total)}."
        )
    if needed > world_size:
        raise LayoutError(
            f"The layout needs {needed} ranks ({table}), but there are {world_size}. Run with "
            f"{fitting_trainer(needed)}, or make a module smaller."
        )
    if needed < world_size:
        raise LayoutError(
            f"{_belong(range(needed, world_size))} to no module ({table}). Every rank must work: run with "
            f"{fitting_trainer(needed)}, or make a module larger."
        )
    return len(distinct) == 1


def _belong(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"Rank {ranks[0]} belongs"
    return f"Ranks {_span(ranks) if isinstance(ranks, range) else ', '.join(map(str, ranks))} belong"


def _check_no_pipeline(name: str, sizes: ModuleParallelism) -> None:
    if sizes.pp > 1:
        raise LayoutError(
            f"Module {name!r}: pp={sizes.pp} does not work where modules share all ranks (a language module alone "
            f"counts as such), because megatron-core runs a colocated model without a pipeline. Set pp=1 and "
            f"tp={sizes.tp * sizes.pp}, which takes as many ranks, or put modules on ranks of their own."
        )


def _check_experts(name: str, complete: Mapping[str, ModuleParallelism], *, colocated: bool) -> None:
    sizes = complete[name]
    stage, experts = sizes.tp * sizes.dp, sizes.expt_tp * sizes.ep
    if stage % experts:
        remedy = f"Choose expt_tp and ep whose product divides {stage}"
        if not colocated:
            dp = math.lcm(_dp_step_of_experts(sizes), *(complete[other].dp for other in _bridged_to(name, complete)))
            remedy += f", or change {_with_dp(name, dp, complete, colocated=False)}"
        raise LayoutError(
            f"Module {name!r}: tp * dp = {sizes.tp} * {sizes.dp} = {stage} ranks a stage is not a multiple of "
            f"expt_tp * ep = {sizes.expt_tp} * {sizes.ep} = {experts}. {remedy}."
        )


def _check_bridge(name: str, complete: Mapping[str, ModuleParallelism], *, colocated: bool) -> None:
    encoder, language = complete[name].dp, complete[LANGUAGE].dp
    if _divide(encoder, language):
        return
    choices = [_with_dp(name, language, complete, colocated=colocated)]
    if not colocated and (common := math.gcd(encoder, language)) != language:
        choices.append(_with_dp(name, common, complete, colocated=colocated))
    if all(_divide(encoder, complete[other].dp) for other in _bridged_to(LANGUAGE, complete)):
        choices.append(_with_dp(LANGUAGE, encoder, complete, colocated=colocated))
    raise LayoutError(
        f"Modules {name!r} (dp={encoder}) and {LANGUAGE!r} (dp={language}): one dp must be a multiple of the other, so "
        f"that each replica of the one feeds whole replicas of the other. Change {'; or '.join(choices)}."
    )


def _divide(one: int, two: int) -> bool:
    return one % two == 0 or two % one == 0


def _bridged_to(name: str, complete: Mapping[str, ModuleParallelism]) -> list[str]:
    return [other for other in complete if other != LANGUAGE] if name == LANGUAGE else [LANGUAGE]


def _with_dp(name: str, dp: int, complete: Mapping[str, ModuleParallelism], *, colocated: bool) -> str:
    """What to change for a module to have another dp, and what goes with it."""
    sizes = complete[name]
    if colocated:
        return f"{name!r} to dp={dp}, tp={sizes.size // dp}"
    ranks = sum(other.size for other in complete.values()) + (dp - sizes.dp) * sizes.ranks_per_replica
    return f"{name!r} to dp={dp} ({fitting_trainer(ranks)})"


def _dp_step_of_experts(sizes: ModuleParallelism) -> int:
    """Every dp that the expert sizes allow is a multiple of this."""
    experts = sizes.expt_tp * sizes.ep
    return experts // math.gcd(experts, sizes.tp)


def _product(sizes: ModuleParallelism) -> str:
    factors = {"tp": sizes.tp, "cp": sizes.cp, "pp": sizes.pp}
    shown = [f"{axis}={size}" for axis, size in factors.items() if size > 1 or axis == "tp"]
    if sizes.dp is not None:
        shown.append(f"dp={sizes.dp}")
    return " * ".join(shown)


def _span(ranks: range) -> str:
    return f"{ranks.start}" if len(ranks) == 1 else f"{ranks.start}-{ranks.stop - 1}"

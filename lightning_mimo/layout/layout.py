"""Which module runs on which ranks, with which parallel sizes: pure data, validated before any process exists.

The user writes one :class:`ModuleParallelism` per module. :meth:`MimoLayout.resolve` fills in omitted values
(``dp``, ``rank_offset``) for a given number of ranks. If the layout cannot run, it raises an error that names the
module, shows the arithmetic and gives a remedy. Nothing here imports torch, so a layout can be validated on a login
node in milliseconds, and every rank reaches the same result without communication.

The ranks of one module are numbered with tp changing fastest, then cp, then dp, then pp: the ``tp-cp-dp-pp`` order
of megatron-core's ``initialize_model_parallel``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from types import MappingProxyType

from lightning_mimo.errors import LayoutError
from lightning_mimo.layout.module_parallelism import (
    LANGUAGE,
    ModuleParallelism,
    ResolvedParallelism,
    dp_step_of_experts,
    fitting_trainer,
    product_of,
    span_of,
)
from lightning_mimo.layout.placement import check_no_pipeline, place_one_after_another, share_all_ranks

MOST_RANKS = 2**15
"""Ranks of the largest run. Without a limit, a typing error would start to build a million process groups."""


@dataclass(frozen=True, kw_only=True)
class MimoLayout:
    """A validated layout in which ``dp`` and ``rank_offset`` of every module are known. Build it with :meth:`resolve`.

    Attributes:
        modules: module name -> complete sizes, in the order in which the user wrote them.
        world_size: number of ranks over all nodes.
        colocated: True if all modules share all ranks, False if their rank ranges are disjoint. A language module alone
            is colocated unless it has several pipeline stages.
    """

    modules: Mapping[str, ResolvedParallelism]
    world_size: int
    colocated: bool

    @classmethod
    def resolve(
        cls, modules: Mapping[str, ModuleParallelism], *, world_size: int, colocate: bool = False
    ) -> MimoLayout:
        """Fill in omitted sizes and validate the layout.

        Example: ``{"images": ModuleParallelism(tp=1), "language": ModuleParallelism(tp=2, dp=1)}`` with
        ``world_size=4`` gives images dp=2 on ranks 0-1 and language on ranks 2-3.

        Args:
            modules: module name -> sizes. One module must be called ``language``.
            world_size: devices per node * number of nodes.
            colocate: put every module on all ranks instead of on consecutive, separate ranks.

        Raises:
            LayoutError: if the layout cannot run; the message names the module and the remedy.
        """
        _check_names(modules)
        if not isinstance(world_size, int) or not 1 <= world_size <= MOST_RANKS:
            raise LayoutError(
                f"devices * num_nodes = {world_size!r} ranks: write a whole number of devices of one node and of "
                f"nodes, at most {MOST_RANKS:,} ranks together."
            )
        for name, sizes in modules.items():
            _check_sizes(name, sizes)
        placed = share_all_ranks(modules, world_size) if colocate else place_one_after_another(modules, world_size)
        complete = {name: sizes.resolved() for name, sizes in placed.items()}
        colocated = _check_coverage(complete, world_size)
        if len(complete) == 1:
            colocated = complete[LANGUAGE].pp == 1
        for name, sizes in complete.items():
            if colocated:
                check_no_pipeline(name, sizes)
            _check_bridge(name, complete, colocated=colocated)
        for name in complete:
            _check_experts(name, complete, colocated=colocated)
        return cls(modules=MappingProxyType(complete), world_size=world_size, colocated=colocated)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of all modules except ``language``."""
        return tuple(name for name in self.modules if name != LANGUAGE)

    def check_modules(self, in_model: Collection[str]) -> None:
        """Check that a model has exactly the modules of the layout.

        Raises:
            LayoutError: naming the modules of both.
        """
        if set(in_model) != set(self.modules):
            raise LayoutError(
                f"The model has the modules {sorted(in_model)}, but the layout of MimoStrategy(modules=...) has "
                f"{sorted(self.modules)}. Give every module of the model a ModuleParallelism and no other."
            )

    def modules_on(self, rank: int) -> tuple[str, ...]:
        """Names of the modules that run on a global rank."""
        return tuple(name for name, sizes in self.modules.items() if rank in sizes.ranks)

    def is_last_stage(self, rank: int) -> bool:
        """Whether a global rank is on the last pipeline stage of the language module, which computes the loss."""
        language = self.modules[LANGUAGE]
        return rank in language.ranks and language.coordinates(rank)["pp"] == language.pp - 1

    def counts_loss(self, rank: int) -> bool:
        """Whether a global rank's loss and tokens count in a sum over all ranks.

        All tensor-parallel ranks of a last stage compute the same loss, so only the first of them counts.
        """
        return self.is_last_stage(rank) and self.modules[LANGUAGE].coordinates(rank)["tp"] == 0


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
        if value > MOST_RANKS:
            raise LayoutError(f"Module {name!r}: {field.name}={value}, but a run has at most {MOST_RANKS:,} ranks.")
    if sizes.cp > 1:
        raise LayoutError(
            f"Module {name!r}: cp={sizes.cp} is not supported, because the bridges between modules exchange whole "
            f"samples and cannot split a sequence. Set cp=1 and tp={sizes.tp * sizes.cp}, which takes as many ranks."
        )


def _check_coverage(complete: Mapping[str, ResolvedParallelism], world_size: int) -> bool:
    """Return whether the layout is colocated; raise if ranks are unused, missing or only partly shared."""
    spans = {name: sizes.ranks for name, sizes in complete.items()}
    table = ", ".join(f"{name} {product_of(complete[name])} on ranks {span_of(span)}" for name, span in spans.items())
    for (one, a), (two, b) in combinations(spans.items(), 2):
        if a != b and max(a.start, b.start) < min(a.stop, b.stop):
            raise LayoutError(
                f"Modules {one!r} (ranks {span_of(a)}) and {two!r} (ranks {span_of(b)}) share some ranks but not all. "
                f"Ranges must be identical (colocate=True) or disjoint (leave rank_offset out)."
            )
    distinct = set(spans.values())
    if len(distinct) not in (1, len(spans)):
        raise LayoutError(
            f"Some modules share their ranks and others do not ({table}). Mixed layouts are not supported: put all "
            f"modules on all ranks (colocate=True), or each on ranks of its own (leave rank_offset out)."
        )
    needed = max(span.stop for span in spans.values())
    if needed > MOST_RANKS:
        raise LayoutError(f"The layout needs {needed:,} ranks ({table}), but a run has at most {MOST_RANKS:,}.")
    if gaps := [rank for rank in range(needed) if not any(rank in span for span in spans.values())]:
        total = sum(sizes.size for sizes in complete.values())
        raise LayoutError(
            f"{_belong(gaps)} to no module ({table}). Every rank must belong to one: close the gap between the "
            f"rank_offsets, or leave them out and run with {fitting_trainer(total)}."
        )
    if needed > world_size:
        raise LayoutError(
            f"The layout needs {needed} ranks ({table}), but there are {world_size}. Run with "
            f"{fitting_trainer(needed)}, or make a module smaller."
        )
    if needed < world_size:
        raise LayoutError(
            f"{_belong(range(needed, world_size))} to no module ({table}). Every rank must belong to one: run with "
            f"{fitting_trainer(needed)}, or make a module larger."
        )
    return len(distinct) == 1


def _belong(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"Rank {ranks[0]} belongs"
    return f"Ranks {span_of(ranks) if isinstance(ranks, range) else ', '.join(map(str, ranks))} belong"


def _check_experts(name: str, complete: Mapping[str, ResolvedParallelism], *, colocated: bool) -> None:
    sizes = complete[name]
    stage, experts = sizes.tp * sizes.dp, sizes.expt_tp * sizes.ep
    if stage % experts:
        remedy = f"Choose expt_tp and ep whose product divides {stage}"
        if not colocated:
            dp = math.lcm(dp_step_of_experts(sizes), *(complete[other].dp for other in _bridged_to(name, complete)))
            remedy += f", or change {_with_dp(name, dp, complete, colocated=False)}"
        raise LayoutError(
            f"Module {name!r}: tp * dp = {sizes.tp} * {sizes.dp} = {stage} ranks per stage is not a multiple of "
            f"expt_tp * ep = {sizes.expt_tp} * {sizes.ep} = {experts}. {remedy}."
        )


def _check_bridge(name: str, complete: Mapping[str, ResolvedParallelism], *, colocated: bool) -> None:
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
        f"that no replica has to be split. Change {'; or '.join(choices)}."
    )


def _divide(one: int, two: int) -> bool:
    return one % two == 0 or two % one == 0


def _bridged_to(name: str, complete: Mapping[str, ResolvedParallelism]) -> list[str]:
    return [other for other in complete if other != LANGUAGE] if name == LANGUAGE else [LANGUAGE]


def _with_dp(name: str, dp: int, complete: Mapping[str, ResolvedParallelism], *, colocated: bool) -> str:
    """Describe how to give a module another dp, including the changes that follow from it."""
    sizes = complete[name]
    if colocated:
        return f"{name!r} to dp={dp}, tp={sizes.size // dp}"
    ranks = sum(other.size for other in complete.values()) + (dp - sizes.dp) * sizes.ranks_per_replica
    return f"{name!r} to dp={dp} ({fitting_trainer(ranks)})"

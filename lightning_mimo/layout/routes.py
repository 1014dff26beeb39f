"""Which ranks exchange what between two modules, or between two pipeline stages of one.

All tensor-parallel ranks of a stage hold the same activations, so every rank of the other side gets them from one of
those directly, and no side passes them on. Samples of one data-parallel replica belong to one replica of the other
side, or to a run of them: the parts of a microbatch, in the order of its samples. Pure Python, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mimo.layout.module_parallelism import ResolvedParallelism


@dataclass(frozen=True, kw_only=True)
class Routes:
    """What one rank exchanges with the other side, the same in both directions.

    Attributes:
        receives: for each part of a microbatch, the global rank that it comes from.
        sends: for each part, the global ranks that it goes to; there may be none.
    """

    receives: tuple[int, ...]
    sends: tuple[tuple[int, ...], ...]

    @property
    def parts(self) -> int:
        return len(self.receives)

    @property
    def receivers(self) -> tuple[int, ...]:
        """All ranks that anything goes to."""
        return tuple(rank for part in self.sends for rank in part)


def routes_between(mine: ResolvedParallelism, theirs: ResolvedParallelism, *, rank: int, stage: int) -> Routes:
    """Routes of a rank of one module to a pipeline stage of another module, or of its own.

    Args:
        mine: resolved sizes of the rank's module.
        theirs: resolved sizes of the other side.
        rank: global rank in ``mine``.
        stage: pipeline stage of ``theirs``.
    """
    place = mine.coordinates(rank)
    parts = max(1, theirs.dp // mine.dp)
    first = place["dp"] * parts if theirs.dp >= mine.dp else place["dp"] // (mine.dp // theirs.dp)
    replicas = range(first, first + parts)
    return Routes(
        receives=tuple(theirs.rank_at(tp=place["tp"] % theirs.tp, dp=dp, pp=stage) for dp in replicas),
        sends=tuple(
            tuple(theirs.rank_at(tp=tp, dp=dp, pp=stage) for tp in range(place["tp"], theirs.tp, mine.tp))
            for dp in replicas
        ),
    )

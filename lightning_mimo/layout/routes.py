"""Which ranks exchange activations between two modules, or between two pipeline stages of one module.

All tensor-parallel ranks of a stage hold the same activations, so every receiving rank gets them directly from one
sender, and no rank forwards them. The samples of one data-parallel replica belong to one replica of the other side, or
to several consecutive ones. In the second case a microbatch is sent in parts, in the order of its samples. Pure
Python, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mimo.layout.module_parallelism import ResolvedParallelism


@dataclass(frozen=True, kw_only=True)
class Routes:
    """The ranks with which one rank exchanges activations and gradients.

    Attributes:
        receives: for each part of a microbatch, the global rank that sends it.
        sends: for each part of a microbatch, the global ranks that receive it; may be empty.
    """

    receives: tuple[int, ...]
    sends: tuple[tuple[int, ...], ...]

    @property
    def parts(self) -> int:
        return len(self.receives)

    @property
    def receivers(self) -> tuple[int, ...]:
        """All ranks that this rank sends to."""
        return tuple(rank for part in self.sends for rank in part)


def routes_between(mine: ResolvedParallelism, theirs: ResolvedParallelism, *, rank: int, stage: int) -> Routes:
    """Routes between a rank of one module and a pipeline stage of another module or of the same one.

    Example: ``mine`` is an encoder with dp=2 on ranks 0-1, ``theirs`` a language module with tp=2, dp=1 on ranks 2-3.
    Rank 0 sends its only part to both: ``sends=((2, 3),)``. It receives the gradient from rank 2: ``receives=(2,)``.

    Args:
        mine: resolved sizes of the rank's module.
        theirs: resolved sizes of the module on the other side.
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

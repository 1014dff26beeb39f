"""Process groups that are made once for each set of ranks, however many names it goes by.

A HyperCommGrid makes a group for every combination of axes. Most of them hold the same ranks: with one pipeline stage
tp * pp is tp, without context parallelism cp * dp is dp, and an axis of size 1 holds this rank alone. Each group costs
connections and threads of its own with gloo, a communicator and its buffers with NCCL.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, override

import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid

from lightning_mimo.layout.module_parallelism import DENSE_AXES, EXPERT_AXES, ResolvedParallelism

EXPERT_VIEW = "expert"
"""Name under which megatron-core's MimoOptimizer looks for the expert factorization of a grid."""

Use = Literal["model", "gradients", "expert gradients", "activations sent", "gradients sent"]
"""What a group is for. Groups of one use may be one group, because all of its ranks call it in the same order. The
reductions of gradients run beside the model's own collectives and, where some replicas have no images, start sooner or
later on one rank than on another; those of experts likewise beside the dense ones; what is sent from stage to stage
keeps an order of its own in each direction. So each keeps to its own groups."""

_Ranks = tuple[int, ...]


class GroupPool:
    """The process groups of a layout, each made when first asked for.

    All ranks must ask for the same groups in the same order, also for those that they are not in.
    """

    def __init__(self, backend: str | None) -> None:
        """
        Args:
            backend: torch.distributed backend of the groups; ``None`` takes the default group's.
        """
        self.backend = backend
        self._groups: dict[tuple[str | None, Use | None, _Ranks], dist.ProcessGroup | None] = {}

    def group_containing_rank(
        self, rank_lists: Iterable[Iterable[int]], *, module: str, use: Use
    ) -> dist.ProcessGroup | None:
        """Of the groups with these ranks, the one that this rank is in, if any. Collective over the world.

        Args:
            rank_lists: ranks of each group, in any order. No two may overlap.
            module: groups are shared within a module only.
            use: and by one use only. A group of one rank is shared by all, since nothing waits in it.
        """
        mine = None
        for ranks in rank_lists:
            members = tuple(sorted(ranks))
            key = (module, use, members) if len(members) > 1 else (None, None, members)
            if key not in self._groups:
                made = dist.new_group(list(members), backend=self.backend)
                self._groups[key] = made if dist.get_rank() in members else None
            if self._groups[key] is not None:
                mine = self._groups[key]
        return mine

    @property
    def mine(self) -> list[dist.ProcessGroup]:
        """All groups that this rank is in."""
        return [group for group in self._groups.values() if group is not None]

    def destroy(self) -> None:
        """Destroy the groups of this rank. Safe to call twice."""
        for group in self.mine:
            dist.destroy_process_group(group)
        self._groups.clear()


class PooledGrid(HyperCommGrid):
    """A HyperCommGrid whose groups come out of a pool, which owns them and shares them where ranks are the same."""

    def __init__(self, module: str, sizes: ResolvedParallelism, pool: GroupPool) -> None:
        """
        Args:
            module: whose grid this is.
            sizes: of the module, resolved.
            pool: of the whole layout.
        """
        super().__init__(list(sizes.shape), list(DENSE_AXES), sizes.rank_offset, backend=pool.backend)
        self.register_view(EXPERT_VIEW, list(sizes.expert_shape), list(EXPERT_AXES), shared_dims=["pp"])
        self._module, self._sizes, self._pool = module, sizes, pool
        self._mine: dict[tuple[Use, tuple[_Ranks, ...]], dist.ProcessGroup | None] = {}

    @override
    def create_pg(self, dims: str | list[str], *, view: str | None = None) -> dist.ProcessGroup | None:
        """As upstream's, without options for the group. Collective over the world."""
        use, ranks = key = self._key(dims, view)
        self._mine[key] = self._pool.group_containing_rank(ranks, module=self._module, use=use)
        return self._mine[key]

    @override
    def get_pg(self, dims: str | list[str], *, view: str | None = None) -> dist.ProcessGroup | None:
        """This rank's group over these axes, or ``None`` on ranks outside of the grid.

        Raises:
            KeyError: if ``create_pg`` was not called for it.
        """
        key = self._key(dims, view)
        if key not in self._mine:
            raise KeyError(f"The group of {dims} (view {view}) has not been created. Call create_pg first.")
        return self._mine[key]

    @override
    def destroy(self) -> None:
        """Forget the groups. The pool destroys them."""
        self._mine.clear()

    def _key(self, dims: str | list[str], view: str | None) -> tuple[Use, tuple[_Ranks, ...]]:
        return self._use_of(dims), tuple(map(tuple, self.get_rank_enum(dims, view=view)))

    def _use_of(self, dims: str | list[str]) -> Use:
        axes = {dims} if isinstance(dims, str) else set(dims)
        if axes == {"expt_dp"}:
            # With ep=1 these are the ranks of dp only if expt_tp is tp, and then experts are reduced with all the rest.
            return "expert gradients" if self._sizes.ep > 1 else "gradients"
        return "gradients" if axes in ({"dp"}, {"dp", "cp"}) else "model"

"""Process groups that are created once for each set of ranks and shared by all axes with these ranks.

A HyperCommGrid creates a group for every combination of axes. Most of them hold the same ranks: with one pipeline
stage tp * pp equals tp, without context parallelism cp * dp equals dp, and an axis of size 1 holds this rank alone.
Each group costs connections and threads with gloo, and a communicator with its buffers with NCCL.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import override

import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid

from lightning_mimo.layout.communicators import Use
from lightning_mimo.layout.module_parallelism import DENSE_AXES, EXPERT_AXES, ResolvedParallelism
from lightning_mimo.parallel.nccl import NcclOptions

EXPERT_VIEW = "expert"
"""View name under which megatron-core's MimoOptimizer looks up the expert axes of a grid."""

_Ranks = tuple[int, ...]


class GroupPool:
    """The process groups of a layout, each created on first request.

    All ranks must request the same groups in the same order, including groups that they are not a member of.
    """

    def __init__(self, backend: str | None, nccl: NcclOptions = NcclOptions()) -> None:
        """
        Args:
            backend: torch.distributed backend of the groups; ``None`` uses that of the default group.
            nccl: options of the groups, if the backend is NCCL.
        """
        self.backend = backend
        self._nccl = nccl
        self._groups: dict[tuple[str | None, Use | None, _Ranks], dist.ProcessGroup | None] = {}

    def group_containing_rank(
        self, rank_lists: Iterable[Iterable[int]], *, module: str, use: Use
    ) -> dist.ProcessGroup | None:
        """Create or reuse groups with these ranks and return the one that contains this rank, if any.

        Collective over the world.

        Args:
            rank_lists: ranks of each group, in any order. The groups must be disjoint.
            module: groups are shared only within a module.
            use: groups are shared only by one use. A group of a single rank is shared by all, since it never waits.
        """
        mine = None
        for ranks in rank_lists:
            members = tuple(sorted(ranks))
            key = (module, use, members) if len(members) > 1 else (None, None, members)
            if key not in self._groups:
                made = self._create(list(members), use)
                # On ranks that are not members torch returns a number.
                self._groups[key] = made if isinstance(made, dist.ProcessGroup) else None
            if self._groups[key] is not None:
                mine = self._groups[key]
        return mine

    def _create(self, members: list[int], use: Use) -> object:
        if dist.get_backend() == "fake" and dist.get_rank() not in members:
            return None  # in a fake world nobody waits for this rank to create it, too
        if use == "announcements" and dist.get_backend() == "nccl":
            return dist.new_group(members, backend="gloo")
        options = self._nccl.for_use(use) if len(members) > 1 else None
        return dist.new_group(members, backend=self.backend, pg_options=options)

    def existing(self, ranks: Iterable[int], *, module: str, use: Use) -> dist.ProcessGroup:
        """The group of more than one rank that was created for these ranks, module and use, on one of its ranks."""
        group = self._groups[module, use, tuple(sorted(ranks))]
        assert group is not None, "this rank is a member"
        return group

    @property
    def mine(self) -> list[dist.ProcessGroup]:
        """All groups that contain this rank."""
        return [group for group in self._groups.values() if group is not None]

    def destroy(self) -> None:
        """Destroy the groups of this rank. Safe to call twice."""
        for group in self.mine:
            dist.destroy_process_group(group)
        self._groups.clear()


class PooledGrid(HyperCommGrid):
    """A HyperCommGrid that takes its groups from a pool, which owns them and shares groups with the same ranks."""

    def __init__(self, module: str, sizes: ResolvedParallelism, pool: GroupPool) -> None:
        """
        Args:
            module: name of the module.
            sizes: resolved sizes of the module.
            pool: the groups of the layout.
        """
        super().__init__(list(sizes.shape), list(DENSE_AXES), sizes.rank_offset, backend=pool.backend)
        self.register_view(EXPERT_VIEW, list(sizes.expert_shape), list(EXPERT_AXES), shared_dims=["pp"])
        self._module, self._sizes, self._pool = module, sizes, pool
        self._mine: dict[tuple[Use, tuple[_Ranks, ...]], dist.ProcessGroup | None] = {}

    @override
    def create_pg(self, dims: str | list[str], *, view: str | None = None) -> dist.ProcessGroup | None:
        """Create the groups over these axes and return this rank's. Collective over the world.

        Unlike megatron-core's method it takes no options for the group.
        """
        use, ranks = key = self._key(dims, view)
        self._mine[key] = self._pool.group_containing_rank(ranks, module=self._module, use=use)
        return self._mine[key]

    @override
    def get_pg(self, dims: str | list[str], *, view: str | None = None) -> dist.ProcessGroup | None:
        """This rank's group over these axes, or ``None`` on ranks outside the grid.

        Raises:
            KeyError: if ``create_pg`` was not called for it.
        """
        key = self._key(dims, view)
        if key not in self._mine:
            raise KeyError(f"The group of {dims} (view {view}) has not been created. Call create_pg first.")
        return self._mine[key]

    @override
    def destroy(self) -> None:
        """Drop the references to the groups. The pool destroys them."""
        self._mine.clear()

    def _key(self, dims: str | list[str], view: str | None) -> tuple[Use, tuple[_Ranks, ...]]:
        return self._use_of(dims), tuple(map(tuple, self.get_rank_enum(dims, view=view)))

    def _use_of(self, dims: str | list[str]) -> Use:
        axes = {dims} if isinstance(dims, str) else set(dims)
        if axes == {"expt_dp"}:
            # With ep=1 and expt_tp=tp these are the ranks of dp, and experts are reduced with the dense parameters.
            return "expert gradients" if self._sizes.ep > 1 else "gradients"
        return "gradients" if axes in ({"dp"}, {"dp", "cp"}) else "model"

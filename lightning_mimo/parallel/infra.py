"""Builds process groups from a layout: one HyperCommGrid and one ProcessGroupCollection per module.

:class:`MimoModelInfra` is the only owner of process groups in this package. All other code borrows them from it, and
:meth:`MimoModelInfra.destroy` is the only place that destroys them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.comm.colocated_communicator import ColocatedBridgeCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection

from lightning_mimo.layout.communicators import SENT, Communicator, Use
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE, ResolvedParallelism
from lightning_mimo.observe.spans import Spans
from lightning_mimo.parallel.nccl import NcclOptions
from lightning_mimo.parallel.process_groups import EXPERT_VIEW, GroupPool, PooledGrid

# Fields of ProcessGroupCollection and the axes that each spans: first the dense axes, then those of the expert view.
_DENSE_GROUPS = {
    "tp": ["tp"],
    "cp": ["cp"],
    "pp": ["pp"],
    "dp": ["dp"],
    "dp_cp": ["cp", "dp"],
    "tp_cp": ["tp", "cp"],
    "mp": ["tp", "pp"],
    "tp_dp_cp": ["tp", "cp", "dp"],
    "intra_dist_opt": ["tp", "cp", "dp", "pp"],
}
_EXPERT_GROUPS = {
    "ep": ["ep"],
    "expt_tp": ["expt_tp"],
    "tp_ep": ["expt_tp", "ep"],
    "tp_ep_pp": ["expt_tp", "ep", "pp"],
    "expt_dp": ["expt_dp"],
}


@dataclass(kw_only=True)
class MimoModelInfra:
    """Grids and process groups of a layout, as seen by this rank.

    Attributes:
        layout: the resolved layout.
        module_to_grid_map: module name -> grid, for all modules, including those that do not run on this rank.
        topology: module name -> names of the modules that receive its output, such as
            ``{"images": ["language"], "language": []}``.
        pg_collections: module name -> process groups, only for modules that run on this rank.
        participating_modules: names of the modules that run on this rank.
        spans: records what this rank does.
    """

    layout: MimoLayout
    module_to_grid_map: dict[str, HyperCommGrid]
    topology: dict[str, list[str]]
    pg_collections: dict[str, ProcessGroupCollection]
    participating_modules: list[str]
    _pool: GroupPool = field(repr=False)
    spans: Spans = field(default_factory=Spans, repr=False)
    _communicators: list[ColocatedBridgeCommunicator] = field(default_factory=list, repr=False)

    @classmethod
    def build(
        cls,
        layout: MimoLayout,
        *,
        backend: str | None = None,
        spans: Spans | None = None,
        nccl: NcclOptions = NcclOptions(),
    ) -> MimoModelInfra:
        """Create the grids and process groups of a layout.

        Collective over the world: every rank must call it with the same layout. torch.distributed must be initialized
        with ``layout.world_size`` ranks.

        Args:
            layout: a resolved layout.
            backend: torch.distributed backend of the groups; ``None`` uses that of the default group.
            spans: records what this rank does; ``None`` creates a new one.
            nccl: options of the groups, if the backend is NCCL.
        """
        assert dist.get_world_size() == layout.world_size, "the layout was resolved for another world size"
        pool = GroupPool(backend, nccl)
        grids = {name: _build_grid(name, sizes, pool) for name, sizes in layout.modules.items()}
        infra = cls(
            layout=layout,
            module_to_grid_map=grids,
            topology={name: [] if name == LANGUAGE else [LANGUAGE] for name in layout.modules},
            pg_collections={},
            participating_modules=list(layout.modules_on(dist.get_rank())),
            _pool=pool,
            spans=spans or Spans(),
        )
        for name, grid in grids.items():
            embedding_group = infra._build_embedding_group(name, grid)
            if name in infra.participating_modules:
                infra.pg_collections[name] = _collect_groups(grid, embedding_group)
        return infra

    @property
    def colocated(self) -> bool:
        return self.layout.colocated

    def group_of_all(self, use: Use) -> dist.ProcessGroup:
        """The group of all ranks for one use. The first call for each use is collective over the world."""
        group = self._pool.group_containing_rank([range(self.layout.world_size)], module="", use=use)
        assert group is not None, "every rank is in it"
        return group

    def register_communicator(self, communicator: ColocatedBridgeCommunicator) -> None:
        """Take ownership of the groups of a communicator that was built on these grids: ``destroy`` releases them."""
        self._communicators.append(communicator)

    def group_of(self, communicator: Communicator) -> dist.ProcessGroup:
        """The group in which one of this rank's communicators is made. The bridges must have been built."""
        if communicator.use == "world":
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        if communicator.use == "bridge":
            bridges = (each for each in self._communicators if each.src_module_name == communicator.module)
            return next(each.gather_pg for each in bridges if each.gather_pg is not None)
        ranks = range(self.layout.world_size) if communicator.use in SENT else communicator.ranks
        return self._pool.existing(ranks, module=communicator.module, use=communicator.use)

    def set_timeout(self, timeout: timedelta) -> None:
        """Set the timeout of all groups of this rank, including those of the bridges.

        torch.distributed does not apply the timeout of the default group to other groups.
        """
        groups = {
            *self._pool.mine,
            *(each.gather_pg for each in self._communicators),
        }
        for group in groups:
            if isinstance(group, dist.ProcessGroup):
                _set_timeout(timeout, group)

    def destroy(self) -> None:
        """Destroy every process group that was created here or registered. Safe to call twice."""
        for communicator in self._communicators:
            communicator.destroy()
        for grid in self.module_to_grid_map.values():
            grid.destroy()
        self._pool.destroy()
        self._communicators.clear()
        self.pg_collections.clear()

    def _build_embedding_group(self, name: str, grid: PooledGrid) -> dist.ProcessGroup | None:
        """Group of the first and last pipeline stage of the language module, which both hold tied word embeddings."""
        if name != LANGUAGE or self.layout.modules[name].pp == 1:
            return None
        ends = [(stages[0], stages[-1]) for stages in grid.get_rank_enum("pp")]
        return self._pool.group_containing_rank(ends, module=name, use="model")


def _set_timeout(timeout: timedelta, group: dist.ProcessGroup) -> None:
    """Set the timeout of one group. torch 2.11 has no public function for it, and its private one skips gloo here."""
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timeout, group)
        return
    for device in group._device_types:
        group._get_backend(device)._set_default_timeout(timeout)


def _build_grid(name: str, sizes: ResolvedParallelism, pool: GroupPool) -> PooledGrid:
    grid = PooledGrid(name, sizes, pool)
    for axes in _DENSE_GROUPS.values():
        grid.create_pg(axes)
    for axes in _EXPERT_GROUPS.values():
        grid.create_pg(axes, view=EXPERT_VIEW)
    return grid


def _collect_groups(grid: PooledGrid, embedding_group: dist.ProcessGroup | None) -> ProcessGroupCollection:
    groups = ProcessGroupCollection()
    for field_name, axes in _DENSE_GROUPS.items():
        setattr(groups, field_name, grid.get_pg(axes))
    for field_name, axes in _EXPERT_GROUPS.items():
        setattr(groups, field_name, grid.get_pg(axes, view=EXPERT_VIEW))
    groups.embd = embedding_group
    groups.pos_embd = None
    return groups

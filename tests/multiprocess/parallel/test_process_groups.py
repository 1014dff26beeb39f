"""Process groups: how many there are, that each is what its name says, and which are kept apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_mimo import MimoLayout, MimoModelInfra, ModuleParallelism
from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.parallel.infra import _DENSE_GROUPS, _EXPERT_GROUPS
from lightning_mimo.parallel.process_groups import EXPERT_VIEW, GroupPool, PooledGrid
from tests.support.rank_pool import RankPool

DENSE_BOUND, EXPERT_BOUND = 9, 13
"""At most so many groups of one rank, in one module: itself alone, tp, pp, tp * pp, tp * dp, all, both ends of the
pipeline, and for gradients dp and tp * dp; then the four of experts."""

LAYOUTS: dict[
    str, tuple[Mapping[str, ModuleParallelism], bool, int]
] = {  # modules, colocated, groups of a rank at most
    "images_dp2-language_tp2": (
        {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2, dp=1)},
        False,
        3,
    ),
    "images_dp2-language_dp2ep2": (
        {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(dp=2, ep=2)},
        False,
        4,
    ),
    "images_dp2-language_pp2": (
        {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(pp=2, dp=1)},
        False,
        3,
    ),
    "images_tp2-language_tp2dp2ep2": (
        {"images": ModuleParallelism(tp=2, dp=1), "language": ModuleParallelism(tp=2, dp=2, ep=2)},
        False,
        EXPERT_BOUND,
    ),
    "colocated-images_dp4-language_tp2dp2": (
        {"images": ModuleParallelism(dp=4), "language": ModuleParallelism(tp=2, dp=2)},
        True,
        2 * 9,
    ),
    "images_tp2dp2-language_tp2pp2": (
        {"images": ModuleParallelism(tp=2, dp=2), "language": ModuleParallelism(tp=2, dp=1, pp=2)},
        False,
        DENSE_BOUND,
    ),
}


def look(modules: Mapping[str, ModuleParallelism], colocate: bool) -> tuple[int, list[str]]:
    """How many groups this rank has, and what is wrong with them."""
    wrong = []
    before = set(dist.distributed_c10d._world.pg_map)
    infra = MimoModelInfra.build(MimoLayout.resolve(modules, world_size=dist.get_world_size(), colocate=colocate))
    made = set(dist.distributed_c10d._world.pg_map) - before
    for name in infra.participating_modules:
        grid, groups = infra.module_to_grid_map[name], infra.pg_collections[name]
        for view, fields in ((None, _DENSE_GROUPS), (EXPERT_VIEW, _EXPERT_GROUPS)):
            for field, axes in fields.items():
                group = grid.get_pg(axes, view=view)
                (expected,) = [ranks for ranks in grid.get_rank_enum(axes, view=view) if dist.get_rank() in ranks]
                if dist.get_process_group_ranks(group) != sorted(expected) or getattr(groups, field) is not group:
                    wrong.append(f"{name} {field}: {dist.get_process_group_ranks(group)}, not {expected}")
                total = torch.tensor(dist.get_rank())
                dist.all_reduce(total, group=group)
                if total != sum(expected):
                    wrong.append(f"{name} {field}: sums to {total}")
        if grid.get_pg("pp", view=EXPERT_VIEW) is not groups.pp:
            wrong.append(f"{name}: another pp for experts")
        beside = {groups.tp, groups.pp, groups.tp_ep, groups.ep, groups.tp_dp_cp, groups.mp, groups.intra_dist_opt}
        if {each for each in (groups.dp, groups.expt_dp) if each.size() > 1} & beside:
            wrong.append(f"{name}: gradients share a group with the model")
        if infra.layout.modules[name].ep > 1 and groups.expt_dp is groups.dp and groups.dp.size() > 1:
            wrong.append(f"{name}: gradients of experts share a group with the dense ones")
    infra.destroy()
    infra.destroy()  # twice is safe
    if left := set(dist.distributed_c10d._world.pg_map) - before:
        wrong.append(f"{len(left)} groups are left")
    return len(made), wrong


@pytest.mark.parametrize(("modules", "colocate", "bound"), LAYOUTS.values(), ids=LAYOUTS)
def test_groups_of_the_same_ranks_are_one(
    rank_pool: RankPool, modules: Mapping[str, ModuleParallelism], colocate: bool, bound: int
) -> None:
    sizes = [each.size for each in modules.values()]
    outcome = rank_pool.run(look, modules, colocate, world_size=max(sizes) if colocate else sum(sizes))
    assert [problem for _, wrong in outcome for problem in wrong] == []
    assert max(count for count, _ in outcome) <= bound


def before_it_is_made() -> None:
    grid = PooledGrid("language", ModuleParallelism(dp=2, rank_offset=0).resolved(), GroupPool(None))
    with pytest.raises(KeyError, match=r"The group of \['dp', 'pp'\] .* has not been created"):
        grid.get_pg(["dp", "pp"])


def test_group_that_was_not_made(rank_pool: RankPool) -> None:
    rank_pool.run(before_it_is_made, world_size=2)


def threads_of_new_groups(number: int) -> tuple[int, int]:
    """How many threads new groups bring, and what the ranks sum to, over one such group after the other."""

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = threads()
    with megatron_on_cpu():
        first, *groups = [dist.new_group() for _ in range(number)]
        made = threads() - before
    dist.destroy_process_group(first)
    total = torch.tensor(dist.get_rank())
    for group in groups:
        dist.all_reduce(total, group=group)
    return made, int(total)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc, which only Linux has")
def test_groups_share_what_waits_for_data(rank_pool: RankPool) -> None:
    # Two threads of each group run its collectives; one more is in all of them.
    assert rank_pool.run(threads_of_new_groups, 5, world_size=2) == [(2 * 5 + 1, 2**3)] * 2

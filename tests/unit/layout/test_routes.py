"""Both sides of every edge mean the same messages, and parts come in the order in which samples are divided."""

from __future__ import annotations

import math
from itertools import chain

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE, ModuleParallelism, ResolvedParallelism
from lightning_mimo.layout.routes import Routes, routes_between


@st.composite
def layouts(draw: st.DrawFn) -> MimoLayout:
    """Up to two encoders beside the language module, with dp sizes that divide one another."""
    language_dp = draw(st.integers(1, 6))
    nesting = st.sampled_from([dp for dp in range(1, 13) if language_dp % dp == 0 or dp % language_dp == 0])
    dp = {"images": draw(nesting), "audio": draw(nesting), LANGUAGE: language_dp}
    modules = {
        name: ModuleParallelism(tp=draw(st.integers(1, 3)), pp=draw(st.integers(1, 3)), dp=each)
        for name, each in dp.items()
    }
    return MimoLayout.resolve(modules, world_size=sum(sizes.size for sizes in modules.values()))


def stage_of(sizes: ModuleParallelism, stage: int) -> list[int]:
    return [rank for rank in sizes.ranks if sizes.coordinates(rank)["pp"] == stage]


def edges_of(layout: MimoLayout) -> list[tuple[str, int, str, int]]:
    """(module, stage) -> (module, stage) of every bridge and of every hop between stages."""
    bridges = [(name, layout.modules[name].pp - 1, LANGUAGE, 0) for name in layout.encoders]
    hops = [(name, stage, name, stage + 1) for name, sizes in layout.modules.items() for stage in range(sizes.pp - 1)]
    return bridges + hops


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layout=layouts())
def test_every_rank_is_sent_what_it_expects_once_and_nothing_else(layout):
    for first, first_stage, second, second_stage in edges_of(layout):
        ends: dict[int, Routes] = {}
        for mine, stage, theirs, other in (
            (first, first_stage, second, second_stage),
            (second, second_stage, first, first_stage),
        ):
            sizes = layout.modules[mine]
            for rank in stage_of(sizes, stage):
                ends[rank] = routes_between(sizes, layout.modules[theirs], rank=rank, stage=other)
        sent = sorted((rank, peer) for rank, routes in ends.items() for peer in routes.receivers)
        received = sorted((peer, rank) for rank, routes in ends.items() for peer in routes.receives)
        assert sent == received
        assert len(set(sent)) == len(sent), "one message of a microbatch from one rank to another"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layout=layouts(), num_microbatches=st.integers(1, 3), multiple=st.integers(1, 2))
def test_parts_are_in_the_order_of_the_samples(layout, num_microbatches, multiple):
    batch = num_microbatches * math.lcm(*(sizes.dp for sizes in layout.modules.values())) * multiple

    def samples(rank: int, module: str, microbatch: int) -> list[int]:
        plan = RankBatchPlan.build(layout, rank, global_batch_size=batch, num_microbatches=num_microbatches)
        return list(plan.shards[module][microbatch])

    for encoder in layout.encoders:
        for mine, theirs in ((encoder, LANGUAGE), (LANGUAGE, encoder)):
            sizes, others = layout.modules[mine], layout.modules[theirs]
            stage, other = (sizes.pp - 1, 0) if mine == encoder else (0, others.pp - 1)
            for rank in stage_of(sizes, stage):
                routes = routes_between(sizes, others, rank=rank, stage=other)
                for microbatch in range(num_microbatches):
                    ours = samples(rank, mine, microbatch)
                    parts = [samples(peer, theirs, microbatch) for peer in routes.receives]
                    assert set(ours) <= set(chain(*parts))
                    assert len(parts) == 1 or list(chain(*parts)) == ours
                    for part, peers in zip(parts, routes.sends, strict=True):
                        assert all(samples(peer, theirs, microbatch) == part for peer in peers)


def test_tensor_parallel_ranks_share_the_sending():
    encoder = ResolvedParallelism(tp=2, dp=1, rank_offset=0)
    language = ResolvedParallelism(tp=4, dp=2, rank_offset=2)
    assert routes_between(encoder, language, rank=1, stage=0) == Routes(receives=(3, 7), sends=((3, 5), (7, 9)))
    assert routes_between(language, encoder, rank=5, stage=0) == Routes(receives=(1,), sends=((),))
    assert routes_between(language, encoder, rank=3, stage=0) == Routes(receives=(1,), sends=((1,),))

"""megatron-core's bridges take replicas in the order in which samples are divided: nothing is moved to do so."""

from __future__ import annotations

import math
import os
from itertools import chain
from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.pipeline_parallel.bridge_communicator import CommRole

from lightning_mimo.batching import RankBatchPlan
from lightning_mimo.bridges import SampleAlignedBridge
from lightning_mimo.layout import MimoLayout
from lightning_mimo.parallelism import DENSE_AXES, LANGUAGE
from lightning_mimo.parallelism import ModuleParallelism as Cut


@st.composite
def layouts(draw: st.DrawFn) -> MimoLayout:
    """Up to two encoders beside the language module, with dp sizes that divide one another."""
    language_dp = draw(st.integers(1, 6))
    nesting = st.sampled_from([dp for dp in range(1, 13) if language_dp % dp == 0 or dp % language_dp == 0])
    dp = {"images": draw(nesting), "audio": draw(nesting), LANGUAGE: language_dp}
    modules = {name: Cut(tp=draw(st.integers(1, 3)), pp=draw(st.integers(1, 3)), dp=each) for name, each in dp.items()}
    return MimoLayout.resolve(modules, world_size=sum(sizes.size for sizes in modules.values()))


def bridge_between(layout: MimoLayout, encoder: str) -> SampleAlignedBridge:
    """A bridge as it would be on rank 0 of the encoder, without process groups."""
    bridge = object.__new__(SampleAlignedBridge)
    sizes = [layout.modules[name] for name in (encoder, LANGUAGE)]
    with mock.patch.dict(os.environ, WORLD_SIZE=str(layout.world_size)):  # in the place of torch.distributed
        bridge.src_grid, bridge.dest_grid = (
            HyperCommGrid(list(each.shape), list(DENSE_AXES), rank_offset=each.rank_offset) for each in sizes
        )
    bridge.current_rank = sizes[0].ranks.start
    bridge.comm_map = {}
    senders, _ = bridge.get_leader_rank(bridge.src_grid, is_src=True)
    receivers, _ = bridge.get_leader_rank(bridge.dest_grid, is_src=False)
    bridge.build_comm_map(senders, receivers)
    return bridge


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layout=layouts(), num_microbatches=st.integers(1, 3), multiple=st.integers(1, 2))
def test_what_a_bridge_concatenates_or_splits_is_in_the_order_of_the_samples(layout, num_microbatches, multiple):
    batch = num_microbatches * math.lcm(*(sizes.dp for sizes in layout.modules.values())) * multiple

    def samples(rank: int, module: str, microbatch: int) -> list[int]:
        plan = RankBatchPlan.build(layout, rank, global_batch_size=batch, num_microbatches=num_microbatches)
        return list(plan.shards[module][microbatch])

    for encoder in layout.encoders:
        for rank, place in bridge_between(layout, encoder).comm_map.items():
            for microbatch in range(num_microbatches):
                if place.role is CommRole.RECEIVER:
                    sent = [samples(sender, encoder, microbatch) for sender in place.recv_from_ranks]
                    ours = samples(rank, LANGUAGE, microbatch)
                    assert set(ours) <= set(chain(*sent))
                    assert len(sent) == 1 or list(chain(*sent)) == ours
                if place.role is CommRole.SENDER:
                    received = [samples(receiver, LANGUAGE, microbatch) for receiver in place.send_to_ranks]
                    ours = samples(rank, encoder, microbatch)
                    assert set(ours) <= set(chain(*received))
                    assert len(received) == 1 or list(chain(*received)) == ours

"""Overlapped reduction where ranks use different layers: one order of buckets everywhere, and the right sums."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from lightning_mimo.optim.ddp import FixedOrderDistributedDataParallel
from tests.parity.cases import ModuleParallelism, apart
from tests.parity.layouts import open_world
from tests.support.rank_pool import RankFailure, RankPool

WIDTHS = (3, 4, 5)


class Layers(torch.nn.Module):
    """Independent layers of different sizes; only those asked for are called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1, width, bias=False) for width in WIDTHS)

    def forward(self, uses: Sequence[int]) -> torch.Tensor:
        ones = torch.ones(1, 1, requires_grad=True)
        # Each use in a graph of its own, so that each brings a gradient of its own.
        outputs = (checkpoint(self.layers[i], ones, use_reentrant=True).sum() for i in uses)
        return sum(outputs, torch.zeros((), requires_grad=True))


def train(ddp: FixedOrderDistributedDataParallel, uses: Sequence[int]) -> tuple[list[int], list[float]]:
    """One batch: the sizes of the buckets in the order of reduction, and an entry of each layer's gradient."""
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def note(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    ddp.zero_grad_buffer()
    with mock.patch.object(dist, "all_reduce", note):
        ddp(uses).backward()
        ddp.finish_grad_sync()
    return sizes, [float(layer.weight.main_grad[0, 0]) for layer in ddp.module.layers]


def train_all(batches: Sequence[Sequence[Sequence[int]]]) -> list[tuple[list[int], list[float]]]:
    """Batches on two replicas, ranks 1 and 2; a batch says which layers each of them uses."""
    with open_world(apart(ModuleParallelism(), ModuleParallelism(dp=2))) as infra:
        if dist.get_rank() == 0:
            return []
        ddp = FixedOrderDistributedDataParallel(
            TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1, calculate_per_token_loss=True),
            DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=1),
            Layers(),
            pg_collection=infra.pg_collections["language"],
        )
        return [train(ddp, by_replica[dist.get_rank() - 1]) for by_replica in batches]


def test_ranks_that_use_different_layers_reduce_in_one_order(rank_pool: RankPool) -> None:
    batches = [[(0, 1, 2), (0, 1, 2)], [(2, 0), (0, 1, 2)], [(0, 2, 1), ()], [(1,), (1,)]]
    _, *found = rank_pool.run(train_all, batches, world_size=3)
    for replica in found:
        assert [gradient for _, gradient in replica] == [[2, 2, 2], [2, 1, 2], [1, 1, 1], [0, 2, 0]]
        assert len({tuple(sizes) for sizes, _ in replica}) == 1
        assert len(replica[0][0]) == len(WIDTHS)
    assert found[0] == found[1]


def test_parameter_used_more_often_than_before_is_refused_by_name(rank_pool: RankPool) -> None:
    batches = [[(0, 1, 2), (0, 1, 2)], [(2, 1, 0, 2), (2, 1, 0, 2)]]
    with pytest.raises(RankFailure, match=r"The gradient of 'layers\.2\.weight' changed after it had been reduced"):
        rank_pool.run(train_all, batches, world_size=3)

"""Options that must not change what is learned, or must change it in a known way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from lightning_mimo import ModuleParallelism
from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.models.sizes import Recompute
from lightning_mimo.parallel.random import seed_megatron
from tests.parity.cases import apart, task, together
from tests.parity.layouts import Layout, errors, train, weights
from tests.parity.model import Model, Samples, SequenceFirst
from tests.parity.oracle import Task, Tensors, truth
from tests.support.rank_pool import RankFailure, RankPool
from tests.support.tiers import exhaustive

FLOAT32 = Task(precision="32-true", start=torch.float32, steps=3)
# How the norm is added up depends on the buckets.
UNCLIPPED = replace(FLOAT32, model=Model(clip_grad=0.0))
DISTRIBUTED = {"use_distributed_optimizer": True}
DDP_OPTIONS = {
    "distributed": DISTRIBUTED,
    "overlapped_reduction": {"overlap_grad_reduce": True, "bucket_size": 200},
    "distributed-overlapped_reduction": {**DISTRIBUTED, "overlap_grad_reduce": True, "bucket_size": 200},
    "distributed-both_overlapped": {
        **DISTRIBUTED,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
        "bucket_size": 200,
    },
}


def trained_weights(task: Task, layout: Layout) -> tuple[list[float], Tensors]:
    """Losses and final weights of this rank."""
    recorder, module, strategy = train(task, layout)
    result = recorder.losses, weights(module.model, strategy.infra)
    strategy.infra.destroy()
    return result


@pytest.mark.parametrize(
    ("colocate", "precision", "names"),
    [
        (False, "32-true", list(DDP_OPTIONS)),
        exhaustive(False, "bf16-mixed", ["distributed-both_overlapped"]),
        exhaustive(True, "32-true", ["overlapped_reduction", "distributed-both_overlapped"]),
    ],
    ids=["apart", "apart-bf16", "colocated"],
)
def test_ddp_options_train_bit_for_bit_the_same(
    rank_pool: RankPool, colocate: bool, precision: str, names: list[str]
) -> None:
    # Two replicas: the sum of two numbers has no order, so not even rounding may differ.
    lay = together if colocate else apart
    task = replace(UNCLIPPED, precision=precision)
    cuts, ranks = (
        ((ModuleParallelism(dp=2), ModuleParallelism(dp=2)), 2)
        if colocate
        else ((ModuleParallelism(dp=2), ModuleParallelism(dp=2, pp=2)), 6)
    )
    plain = rank_pool.run(trained_weights, task, lay(*cuts), world_size=ranks)
    for name in names:
        found = rank_pool.run(trained_weights, task, lay(*cuts, ddp=DDP_OPTIONS[name]), world_size=ranks)
        for (losses, tensors), (plain_losses, plain_tensors) in zip(found, plain, strict=True):
            assert losses == plain_losses, name
            assert tensors.keys() == plain_tensors.keys()
            for parameter, tensor in tensors.items():
                assert torch.equal(tensor, plain_tensors[parameter]), f"{name}: {parameter}"


def test_each_module_may_have_ddp_options_of_its_own(rank_pool: RankPool) -> None:
    layout = apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2, pp=2))
    plain = rank_pool.run(trained_weights, UNCLIPPED, layout, world_size=layout.ranks)
    mixed = replace(layout, ddp={"images": DDP_OPTIONS["distributed-both_overlapped"], "language": {}})
    found = rank_pool.run(trained_weights, UNCLIPPED, mixed, world_size=layout.ranks)
    for (_, tensors), (_, plain_tensors) in zip(found, plain, strict=True):
        assert all(torch.equal(tensor, plain_tensors[name]) for name, tensor in tensors.items())


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (Model(), apart(ModuleParallelism(dp=3), ModuleParallelism(tp=2, pp=2))),
        (Model(frozen=("images",)), apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2, pp=2))),
        (Model(experts=4), apart(ModuleParallelism(dp=2), ModuleParallelism(dp=4, ep=2), num_microbatches=3)),
        (Model(tied=True), apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2, pp=2))),
        (
            Model(),
            together(
                ModuleParallelism(dp=4), ModuleParallelism(tp=2, dp=2), num_microbatches=3, sequence_parallel=True
            ),
        ),
    ],
    ids=["dense", "frozen_images", "experts", "tied", "colocated-sequence_parallel"],
)
def test_gradients_of_the_distributed_optimizer_are_those_of_one_process(
    rank_pool: RankPool, model: Model, layout: Layout
) -> None:
    task = replace(FLOAT32, model=model)
    expected = rank_pool.run(truth, task, world_size=1)[0]
    layout = replace(layout, ddp=DDP_OPTIONS["distributed-both_overlapped"])
    found = rank_pool.run(errors, task, layout, expected, world_size=layout.ranks)
    assert max(each.norm for each in found) < 2e-6
    assert max(each.gradient for each in found) < 5e-5  # of the smallest parameters, in float32


def test_a_batch_cut_in_any_way_is_one_batch(rank_pool: RankPool) -> None:
    layout = apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2), num_microbatches=1)
    at_once = rank_pool.run(trained_weights, task(batch=24, samples=Samples(number=48)), layout, world_size=4)
    for microbatches, batch, accumulate in ((12, 24, 1), (1, 2, 12), (2, 8, 3)):
        cut = task(batch=batch, accumulate=accumulate, samples=Samples(number=48))
        found = rank_pool.run(trained_weights, cut, replace(layout, num_microbatches=microbatches), world_size=4)
        for (_, tensors), (_, expected) in zip(found, at_once, strict=True):
            for name, tensor in tensors.items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-11)


# ---- dropout

DROPOUT = task(dropout=0.3)


@pytest.mark.parametrize(
    "layout",
    [
        exhaustive(apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2, pp=2))),
        exhaustive(together(ModuleParallelism(tp=2), ModuleParallelism(tp=2))),
        apart(ModuleParallelism(), ModuleParallelism(tp=2), sequence_parallel=True),
    ],
    ids=["apart", "colocated", "sequence_parallel"],
)
def test_dropout_is_the_same_in_every_run_of_a_layout(rank_pool: RankPool, layout: Layout) -> None:
    first = rank_pool.run(trained_weights, DROPOUT, layout, world_size=layout.ranks)
    again = rank_pool.run(trained_weights, DROPOUT, layout, world_size=layout.ranks)
    without = rank_pool.run(trained_weights, task(), layout, world_size=layout.ranks)
    for (losses, tensors), (losses_again, tensors_again) in zip(first, again, strict=True):
        assert losses == losses_again
        assert all(torch.equal(tensor, tensors_again[name]) for name, tensor in tensors.items())
    assert first[0][0] != without[0][0]


@pytest.mark.parametrize(
    "recompute", [Recompute(), exhaustive(Recompute(granularity="selective"))], ids=["full", "selective"]
)
def test_recomputed_activations_drop_the_same(rank_pool: RankPool, recompute: Recompute) -> None:
    layout = apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2, pp=2))
    kept = rank_pool.run(trained_weights, DROPOUT, layout, world_size=6)
    again = rank_pool.run(trained_weights, DROPOUT, replace(layout, recompute=recompute), world_size=6)
    for (losses, tensors), (losses_again, tensors_again) in zip(kept, again, strict=True):
        assert losses == losses_again
        assert all(torch.equal(tensor, tensors_again[name]) for name, tensor in tensors.items())


def test_recomputed_mlp_with_biases_is_refused(rank_pool: RankPool) -> None:
    recompute = Recompute(granularity="selective", modules=("mlp",))
    layout = together(ModuleParallelism(), ModuleParallelism(), recompute=recompute)
    with pytest.raises(RankFailure, match=r"'mlp', \.\.\.\)\) does not work with an MLP that has biases.*'core_attn'"):
        rank_pool.run(train, task(), layout, world_size=1)


def test_dropout_leaves_what_tensor_parallel_ranks_share_the_same(rank_pool: RankPool) -> None:
    # With different masks for hidden states, layer norms would get other gradients on the other rank, and part.
    layout = apart(ModuleParallelism(tp=2), ModuleParallelism(tp=2))
    found = [tensors for _, tensors in rank_pool.run(trained_weights, DROPOUT, layout, world_size=4)]
    for one, other in (found[:2], found[2:]):
        shared = [name for name in one if "layernorm" in name]
        assert shared
        assert all(torch.equal(one[name], other[name]) for name in shared)


def draw(modules: dict[str, ModuleParallelism], *, colocate: bool) -> tuple[list[float], list[float]]:
    """Numbers that this rank draws outside and inside of tensor-parallel regions."""
    layout = MimoLayout.resolve(modules, world_size=dist.get_world_size(), colocate=colocate)
    with megatron_on_cpu():
        seed_megatron(layout, dist.get_rank(), seed=5)
        outside = torch.rand(4).tolist()
        with get_cuda_rng_tracker().fork():
            inside = torch.rand(4).tolist()
    return outside, inside


@pytest.mark.parametrize("colocate", [False, True], ids=["apart", "colocated"])
def test_masks_are_shared_where_they_must_be_and_nowhere_else(rank_pool: RankPool, colocate: bool) -> None:
    modules = {"images": ModuleParallelism(tp=2, dp=2), "language": ModuleParallelism(tp=2, dp=2)}
    ranks = 4 if colocate else 8
    found = rank_pool.run(draw, modules, colocate=colocate, world_size=ranks)
    outside = [numbers for numbers, _ in found]
    inside = [numbers for _, numbers in found]
    for first in range(0, ranks, 2):
        assert outside[first] == outside[first + 1], "tensor-parallel ranks drop the same hidden states"
    assert len({tuple(numbers) for numbers in outside}) == ranks // 2, "replicas and modules drop different ones"
    assert len({tuple(numbers) for numbers in inside}) == ranks, "every rank drops its own attention heads"


# ---- what is frozen


def traffic(task: Task, layout: Layout) -> Counter[str]:
    """What this rank sent point to point, and how much it reduced, while it trained."""
    counted: Counter[str] = Counter()
    send, all_reduce = dist.isend, dist.all_reduce

    def count_send(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted["sent"] += tensor.is_floating_point()
        return send(tensor, *args, **kwargs)

    def count_reduced(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted["reduced numbers"] += tensor.numel()
        return all_reduce(tensor, *args, **kwargs)

    with (
        mock.patch.object(dist, "isend", count_send),
        mock.patch.object(dist, "all_reduce", count_reduced),
    ):
        _, module, strategy = train(task, layout)
    counted["trained numbers"] = sum(p.numel() for p in module.model.parameters() if p.requires_grad)
    strategy.infra.destroy()
    return counted


def test_nothing_is_sent_back_to_or_reduced_for_a_frozen_encoder(rank_pool: RankPool) -> None:
    layout = apart(ModuleParallelism(pp=2, dp=2), ModuleParallelism())
    *images, language = rank_pool.run(traffic, task(frozen=("images",)), layout, world_size=5)
    *_, language_otherwise = rank_pool.run(traffic, task(), layout, world_size=5)
    assert language_otherwise["sent"] == 8, "2 steps * 2 microbatches * 2 replicas: the counting itself works"
    assert language["sent"] == 0
    # One message forward for each step and microbatch, none back between the encoder's stages.
    assert [counted["sent"] for counted in images] == [4, 4, 4, 4]
    # The sample check, the loss, the norm: nothing as large as a gradient buffer.
    assert all(counted["trained numbers"] == 0 and counted["reduced numbers"] < 400 for counted in images)


def test_all_parameters_frozen_is_refused(rank_pool: RankPool) -> None:
    with pytest.raises(RankFailure, match="All parameters of the model are frozen: there is nothing to train"):
        rank_pool.run(
            train, task(frozen=("images", "language")), apart(ModuleParallelism(), ModuleParallelism()), world_size=2
        )


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        ("pictures", r"frozen='pictures': there is no module 'pictures'; the layout has 'images', 'language'"),
        ("images.encoder", r"frozen=\['images.encoder'\]: no parameter lies under these names"),
    ],
    ids=["module", "part"],
)
def test_frozen_name_that_fits_nothing_is_refused(rank_pool: RankPool, frozen: str, message: str) -> None:
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(train, task(frozen=(frozen,)), apart(ModuleParallelism(), ModuleParallelism()), world_size=2)


def test_encoder_that_is_not_divided_into_stages_is_refused(rank_pool: RankPool) -> None:
    message = r"Module 'audio': pp=2, but stage 1 holds 'audio\.encoders\.clips\.\w+\S*' and \d more, which an earlier"
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(
            train,
            task(audio=True),
            apart(ModuleParallelism(), ModuleParallelism(), ModuleParallelism(pp=2)),
            world_size=4,
        )


@pytest.mark.parametrize("lay", [apart, together], ids=["apart", "colocated"])
def test_encoder_that_is_not_batch_first_is_refused(rank_pool: RankPool, lay: Callable[..., Layout]) -> None:
    layout = lay(ModuleParallelism(), ModuleParallelism(), ModuleParallelism())
    message = r"Module 'audio': SequenceFirst was given 6 items and returned embeddings of the shape \(3, 6, 16\)\."
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(
            train,
            task(audio=True, clip_encoder=SequenceFirst, samples=Samples(clips=(1,))),
            layout,
            world_size=layout.ranks,
        )

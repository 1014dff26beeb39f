"""Initial weights: each shard is cut from one master that depends on the seed and the global name only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lightning_mimo.mimo.initialization import (
    RecordInitializers,
    fan_in_normal_,
    global_named_parameters,
    initialize_by_name,
)
from lightning_mimo.parallel.random import seed_for


@dataclass(frozen=True)
class Group:
    """Stands for a torch.distributed process group."""

    place: int = 0
    members: int = 1

    def rank(self) -> int:
        return self.place

    def size(self) -> int:
        return self.members


@dataclass(frozen=True)
class Groups:
    """Stands for megatron-core's ProcessGroupCollection."""

    tp: Group = Group()
    expt_tp: Group = Group()
    ep: Group = Group()


class Weight(nn.Module):
    """One parameter ``[rows, columns]``, cut as megatron-core marks it, under an initializer."""

    def __init__(
        self,
        initializer: Callable[[torch.Tensor], object] = nn.init.normal_,
        *,
        shape: tuple[int, ...] = (8, 8),
        groups: Groups = Groups(),
        dim: int | None = None,
        stride: int = 1,
        expert: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        shape = list(shape)
        if dim is not None:
            shape[dim] //= (groups.expt_tp if expert else groups.tp).size()
        self.weight = nn.Parameter(torch.full(shape, torch.nan, dtype=dtype))
        if dim is not None:
            self.weight.tensor_model_parallel = True
            self.weight.partition_dim = dim
            self.weight.partition_stride = stride
        if expert:
            self.weight.allreduce = False
        initializer(self.weight)


def initialized(build: Callable[[], nn.Module], *, groups: Groups = Groups(), seed: int = 1) -> nn.Module:
    with RecordInitializers() as initializers:
        module = build()
    initialize_by_name(module, prefix="language_model", seed=seed, initializers=initializers, groups=groups)
    return module


def weight_of_rank(rank: int, size: int, **kwargs) -> torch.Tensor:
    groups = Groups(tp=Group(rank, size))
    return initialized(lambda: Weight(groups=groups, **kwargs), groups=groups).weight.detach()


def test_seed_for_a_name_is_pinned():
    # Other numbers here mean that every run starts and shuffles otherwise than before.
    assert seed_for(1, "language_model.a") == 6632385537088330883
    assert seed_for(2, "x") == 3837662852862097587


def test_seeds_fit_a_generator_and_differ():
    seeds = {seed_for(seed, f"name{i}") for seed in range(10) for i in range(10)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("initializer", [nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, fan_in_normal_])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_are_cut_from_one_master(initializer, dim, size):
    master = initialized(lambda: Weight(initializer)).weight
    shards = [weight_of_rank(rank, size, initializer=initializer, dim=dim) for rank in range(size)]
    assert torch.equal(torch.cat(shards, dim=dim), master)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_matrices_that_lie_one_after_the_other_are_each_cut(size):
    gate, up = initialized(Weight).weight.chunk(2)
    shards = [weight_of_rank(rank, size, dim=0, stride=2) for rank in range(size)]
    for shard, its_gate, its_up in zip(shards, gate.chunk(size), up.chunk(size), strict=True):
        assert torch.equal(shard, torch.cat([its_gate, its_up]))


def test_parameter_that_is_not_cut_is_the_same_on_all_ranks():
    assert torch.equal(weight_of_rank(0, 2), weight_of_rank(1, 2))


def test_expert_weights_are_cut_by_the_expert_tensor_parallel_group():
    groups = Groups(tp=Group(3, 4), expt_tp=Group(1, 2))
    shard = initialized(lambda: Weight(groups=groups, dim=0, expert=True), groups=groups).weight
    assert torch.equal(shard, initialized(Weight).weight[4:])


def test_scale_is_that_of_the_whole_weight():
    shard = weight_of_rank(0, 4, initializer=fan_in_normal_, shape=(64, 1024), dim=1)
    assert shard.std().item() == pytest.approx(1024**-0.5, rel=0.05)


def test_arguments_of_the_initializer_are_replayed():
    weight = initialized(lambda: Weight(lambda tensor: nn.init.uniform_(tensor, 3.0, b=4.0))).weight
    assert 3 <= weight.min() < weight.max() <= 4


def test_methods_of_parameters_are_replayed_too():
    def fill(tensor: torch.Tensor) -> None:
        with torch.no_grad():
            tensor.normal_(mean=100.0)

    assert initialized(lambda: Weight(fill)).weight.mean().item() == pytest.approx(100, abs=1)


def test_last_initializer_counts():
    def fill(tensor: torch.Tensor) -> None:
        nn.init.normal_(tensor)
        nn.init.uniform_(tensor, 5.0, 6.0)

    assert initialized(lambda: Weight(fill)).weight.min() >= 5


def test_constants_are_left_as_they_are():
    assert torch.equal(initialized(lambda: Weight(nn.init.ones_)).weight, torch.ones(8, 8))


def test_weights_of_another_dtype_are_the_same_but_for_rounding():
    half = initialized(lambda: Weight(dtype=torch.bfloat16)).weight
    assert torch.equal(half, initialized(Weight).weight.bfloat16())


def test_steps_after_the_random_one_are_not_lost():
    def fill(tensor: torch.Tensor) -> None:
        nn.init.trunc_normal_(tensor, std=5.0, a=-1.0, b=1.0)

    weight = initialized(lambda: Weight(fill)).weight
    assert weight.abs().max() <= 1


def test_padding_row_of_an_embedding_stays_zero():
    embedding = initialized(lambda: nn.Embedding(8, 4, padding_idx=3))
    assert torch.equal(embedding.weight[3], torch.zeros(4))
    assert embedding.weight[2].abs().min() > 0


def test_values_written_past_autograd_are_kept():
    def pretrained() -> nn.Module:
        module = Weight()
        module.weight.data = torch.arange(64.0).view(8, 8)
        return module

    assert torch.equal(initialized(pretrained).weight, torch.arange(64.0).view(8, 8))


def test_weights_depend_on_seed_and_name_and_not_on_what_was_drawn_before():
    def two() -> nn.Module:
        return nn.ModuleDict({"first": Weight(), "second": Weight()})

    one = initialized(two)
    torch.rand(5)
    again = initialized(lambda: nn.ModuleDict({"second": Weight()}))
    assert torch.equal(one["second"].weight, again["second"].weight)
    assert not torch.equal(one["first"].weight, one["second"].weight)
    assert not torch.equal(one["first"].weight, initialized(two, seed=2)["first"].weight)


def test_replaying_leaves_the_surrounding_generator_as_it_was():
    with RecordInitializers() as initializers:
        module = Weight()
    before = torch.get_rng_state()
    initialize_by_name(module, prefix="l", seed=1, initializers=initializers, groups=Groups())
    assert torch.equal(torch.get_rng_state(), before)


def stage(*layer_numbers: int) -> nn.Module:
    """A pipeline stage as megatron-core numbers its layers: from 1, over all stages."""
    layers = nn.ModuleList([Weight() for _ in layer_numbers])
    for layer, number in zip(layers, layer_numbers, strict=True):
        layer.layer_number = number
    return nn.ModuleDict({"decoder": nn.ModuleDict({"layers": layers})})


def test_layers_are_named_by_their_number_over_all_stages():
    names = [name for name, _ in global_named_parameters(stage(3, 4), prefix="language_model", groups=Groups())]
    assert names == ["language_model.decoder.layers.2.weight", "language_model.decoder.layers.3.weight"]


def test_layer_starts_the_same_on_whichever_stage_it_sits():
    whole = initialized(lambda: stage(1, 2, 3, 4))["decoder"]["layers"]
    last = initialized(lambda: stage(3, 4))["decoder"]["layers"]
    assert torch.equal(last[0].weight, whole[2].weight)
    assert torch.equal(last[1].weight, whole[3].weight)


def test_experts_are_named_over_all_expert_parallel_ranks():
    experts = nn.Module()
    experts.local_experts = nn.ModuleList([Weight(), Weight()])
    module = nn.ModuleDict({"mlp": experts})
    names = [name for name, _ in global_named_parameters(module, prefix="l", groups=Groups(ep=Group(2, 4)))]
    assert names == ["l.mlp.local_experts.4.weight", "l.mlp.local_experts.5.weight"]


def test_tied_embedding_has_the_name_of_the_first_stage():
    output = nn.ModuleDict({"output_layer": Weight()})
    output["output_layer"].weight.shared_embedding = True
    names = [name for name, _ in global_named_parameters(output, prefix="language_model", groups=Groups())]
    assert names == ["language_model.embedding.word_embeddings.weight"]

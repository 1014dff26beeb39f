"""The nine functions of the reference page, on real grids and modules."""

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.mimo import MimoModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from lightning_mimo.layout.module_parallelism import LANGUAGE, ModuleParallelism
from lightning_mimo.mimo.model import module_and_name
from lightning_mimo.mimo_parallel_utils import (
    build_pg_collection_for_schedule,
    finalize_model_grads_multimodule,
    get_module_to_grid_tuple,
    is_current_rank_in_grid,
    multimodule_no_sync,
    unwrap_mimo_model,
    validate_data_loader_contract,
    validate_no_stub_ranks,
    zero_grad_buffer_for_multimodule,
)
from lightning_mimo.optim.ddp import FixedOrderDistributedDataParallel, options_by_module, wrap_with_ddp
from lightning_mimo.parallel.infra import MimoModelInfra
from tests.support.rank_pool import RankPool
from tests.support.tiny import tiny_model, tiny_world

IMAGES = "images"
GARBAGE = -1000  # the token count where no loss is computed


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout and what follows from it, worked out by hand.

    Attributes:
        replicas: module -> for each of its shards, the ranks that hold a replica of it.
        loss_tokens: rank -> loss tokens it counts, on the ranks of the last language stage.
        total_tokens: loss tokens of the global batch.
    """

    modules: Mapping[str, ModuleParallelism]
    colocate: bool = False
    world_size: int = 4
    replicas: Mapping[str, list[list[int]]]
    loss_tokens: Mapping[int, int]
    total_tokens: int

    def modules_on(self, rank: int) -> list[str]:
        """Modules of a rank, the language module last."""
        return [name for name in (IMAGES, LANGUAGE) if rank in itertools.chain(*self.replicas[name])]

    def replicas_of(self, name: str, rank: int) -> list[int]:
        """Ranks that hold the same shard of a module as this one."""
        return next(ranks for ranks in self.replicas[name] if rank in ranks)


LAYOUTS = {
    "images_dp2-language_tp2": Layout(
        modules={"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)},
        replicas={"images": [[0, 1]], "language": [[2], [3]]},
        loss_tokens={2: 7, 3: 7},
        total_tokens=7,
    ),
    "images_dp2-language_pp2": Layout(
        modules={"images": ModuleParallelism(dp=2), "language": ModuleParallelism(pp=2)},
        replicas={"images": [[0, 1]], "language": [[2], [3]]},
        loss_tokens={3: 7},
        total_tokens=7,
    ),
    "images_dp1-language_dp2": Layout(
        modules={"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=2)},
        world_size=3,
        replicas={"images": [[0]], "language": [[1, 2]]},
        loss_tokens={1: 3, 2: 8},
        total_tokens=11,
    ),
    "colocated-language_tp2_dp2-images_dp4": Layout(
        modules={"language": ModuleParallelism(tp=2, dp=2), "images": ModuleParallelism(dp=4)},
        colocate=True,
        replicas={"images": [[0, 1, 2, 3]], "language": [[0, 2], [1, 3]]},
        loss_tokens={0: 3, 1: 3, 2: 8, 3: 8},
        total_tokens=11,
    ),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
TWO_RANKS = {"images": ModuleParallelism(), "language": ModuleParallelism()}


# ---- which modules and groups this rank has ----


class Wrapper(nn.Module):
    """Any wrapper, whoever wrote it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def unwrap_in_wrappers() -> list[bool]:
    with tiny_world(TWO_RANKS) as (infra, model):
        config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4, bf16=True)
        half = Float16Module(config, model)
        (groups,) = infra.pg_collections.values()
        ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), half, pg_collection=groups)
        return [unwrap_mimo_model(wrapped) is model for wrapped in (model, half, Wrapper(model), ddp, Wrapper(ddp))]


def test_unwrap_mimo_model(rank_pool: RankPool) -> None:
    assert rank_pool.run(unwrap_in_wrappers, world_size=2) == [[True] * 5] * 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(1, 1), "No MimoModel inside Linear: the innermost module is a Linear"),
        (Wrapper(Wrapper(nn.Linear(1, 1))), "No MimoModel inside Wrapper: the innermost module is a Linear"),
        (Wrapper(None), "No MimoModel inside Wrapper: the innermost module is a Wrapper"),
    ],
    ids=["bare", "wrapped", "empty_wrapper"],
)
def test_unwrap_without_mimo_model(model: nn.Module, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        unwrap_mimo_model(model)


@dataclass(frozen=True)
class RankView:
    """What the functions say on one rank."""

    in_grid: list[str]
    wrapped: list[tuple[str, type]]
    bare: list[tuple[str, type]]
    language_in_schedule: str | None
    groups_in_schedule: list[str]
    groups_created: int


def view_of_rank(layout: Layout) -> RankView:
    with tiny_world(layout.modules, colocate=layout.colocate) as (infra, model):
        bare = named_pairs(model, infra)
        wrap_with_ddp(model, infra, options_by_module(None, infra.layout.modules))
        groups_before = len(dist.distributed_c10d._world.pg_map)
        schedule = build_pg_collection_for_schedule(infra)
        return RankView(
            in_grid=[name for name, grid in infra.module_to_grid_map.items() if is_current_rank_in_grid(grid)],
            wrapped=named_pairs(Wrapper(model), infra),
            bare=bare,
            language_in_schedule=schedule.language_model_module_name if schedule.has_language_model() else None,
            groups_in_schedule=[name for name in schedule.module_pgs if schedule[name] is infra.pg_collections[name]],
            groups_created=len(dist.distributed_c10d._world.pg_map) - groups_before,
        )


def named_pairs(model: nn.Module, infra: MimoModelInfra) -> list[tuple[str, type]]:
    """Name of each pair's grid and type of its module, after a check that the two belong together."""
    names = {id(grid): name for name, grid in infra.module_to_grid_map.items()}
    pairs = [(names[id(grid)], module) for module, grid in get_module_to_grid_tuple(model, infra)]
    for name, module in pairs:
        assert module is module_and_name(unwrap_mimo_model(model), name)[0], name
    return [(name, type(module)) for name, module in pairs]


@each_layout
def test_modules_and_groups_of_each_rank(rank_pool: RankPool, layout: Layout) -> None:
    views = rank_pool.run(view_of_rank, layout, world_size=layout.world_size)
    for rank, view in enumerate(views):
        here = layout.modules_on(rank)
        assert set(view.in_grid) == set(here)
        assert view.wrapped == [(name, FixedOrderDistributedDataParallel) for name in here]
        assert [name for name, _ in view.bare] == here
        assert not [kind for _, kind in view.bare if issubclass(kind, DistributedDataParallel)]
        assert view.language_in_schedule == (LANGUAGE if LANGUAGE in here else None)
        assert set(view.groups_in_schedule) == set(here)
        assert view.groups_created == 0


# ---- gradients ----


def holds_back(module: DistributedDataParallel) -> bool:
    (state,) = {not group.is_last_microbatch for group in module.bucket_groups}
    return state


def hold_back_gradients(layout: Layout) -> list[list[bool]]:
    """State of each module before, inside and after, then inside and after a context that ends with an exception."""
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=True)
    with tiny_world(layout.modules, colocate=layout.colocate, ddp=ddp) as (infra, model):
        pairs = get_module_to_grid_tuple(model, infra)
        not_wrapped = (nn.Linear(1, 1), pairs[0][1])
        no_sync_func = partial(multimodule_no_sync, module_to_grid_tuple=[*pairs, not_wrapped])

        def state() -> list[bool]:
            return [holds_back(module) for module, _ in pairs]

        states = [state()]
        with no_sync_func():
            states.append(state())
        states.append(state())
        with pytest.raises(ZeroDivisionError, match="division by zero"), no_sync_func():
            states.append(state())
            _ = 1 / 0
        states.append(state())
        return states


@pytest.mark.parametrize("name", ["images_dp2-language_tp2", "colocated-language_tp2_dp2-images_dp4"])
def test_no_sync_holds_back_every_module(rank_pool: RankPool, name: str) -> None:
    layout = LAYOUTS[name]
    for rank, states in enumerate(rank_pool.run(hold_back_gradients, layout, world_size=4)):
        modules = len(layout.modules_on(rank))
        assert states == [[held] * modules for held in (False, True, False, True, False)]


def test_no_sync_takes_keywords_only() -> None:
    with pytest.raises(TypeError, match="takes 0 positional arguments"):
        multimodule_no_sync([])


def wrap_averaging(model: MimoModel, infra: MimoModelInfra, names: Collection[str]) -> None:
    """Wrap modules in DDP as for a loss that is not per token: it averages over replicas where it otherwise sums."""
    config = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1, calculate_per_token_loss=False)
    for name in set(names) & set(infra.participating_modules):
        module, _ = module_and_name(model, name)
        wrapped = DistributedDataParallel(
            config, DistributedDataParallelConfig(), module, pg_collection=infra.pg_collections[name]
        )
        if name == LANGUAGE:
            model.language_model = wrapped
        else:
            model.modality_submodules[name] = wrapped


class Gradient(NamedTuple):
    module: str
    parameter: str
    number: int  # the same in all replicas of the parameter
    values: torch.Tensor


def gradients(model: MimoModel, infra: MimoModelInfra) -> Iterator[Gradient]:
    for name in infra.participating_modules:
        module, _ = module_and_name(model, name)
        for number, (parameter_name, parameter) in enumerate(module.named_parameters(), start=1):
            yield Gradient(name, parameter_name, number, parameter.main_grad)


def local_gradient(rank: int, number: int) -> float:
    """What the parameter's gradient is filled with on one rank: no two sums over ranks are alike."""
    return float(10 * 2**rank + number)


def check_finalized_gradients(layout: Layout) -> None:
    here = dist.get_rank()
    tokens = torch.tensor(layout.loss_tokens.get(here, GARBAGE), dtype=torch.int)
    no_tokens = torch.tensor(0 if here in layout.loss_tokens else GARBAGE, dtype=torch.int)
    language_dp = len(layout.replicas[LANGUAGE][0])
    with tiny_world(layout.modules, colocate=layout.colocate) as (infra, _):
        for averaging in ([], [IMAGES], [LANGUAGE], [IMAGES, LANGUAGE]):
            model = tiny_model(infra)
            wrap_averaging(model, infra, averaging)
            wrap_with_ddp(model, infra, options_by_module(None, infra.layout.modules))
            for num_tokens, divisor in (
                (tokens, layout.total_tokens),
                (tokens / 64, layout.total_tokens / 64),  # less than 1
                (no_tokens, 1),
                (None, language_dp),
            ):
                finalize_local_gradients(model, infra, num_tokens)
                for gradient in gradients(model, infra):
                    replicas = layout.replicas_of(gradient.module, here)
                    total = sum(local_gradient(rank, gradient.number) for rank in replicas)
                    case = f"{gradient.module}: {gradient.parameter}, {averaging=}, {num_tokens=}"
                    assert_all_equal(gradient.values, total / divisor, case)


def finalize_local_gradients(model: MimoModel, infra: MimoModelInfra, num_tokens: torch.Tensor | None) -> None:
    for gradient in gradients(model, infra):
        gradient.values.fill_(local_gradient(dist.get_rank(), gradient.number))
    pairs = get_module_to_grid_tuple(model, infra)
    finalize = partial(finalize_model_grads_multimodule, infra=infra, module_to_grid_tuple=pairs)
    # As the schedule calls it.
    finalize([model], num_tokens, build_pg_collection_for_schedule(infra), force_all_reduce=False)


def assert_all_equal(values: torch.Tensor, expected: float, case: str) -> None:
    torch.testing.assert_close(values, torch.full_like(values, expected), msg=lambda text: f"{case}: {text}")


@each_layout
def test_finalized_gradients_are_those_of_one_loss(rank_pool: RankPool, layout: Layout) -> None:
    """Sums over a module's replicas, divided by the tokens or by the language replicas, however DDP is set up."""
    rank_pool.run(check_finalized_gradients, layout, world_size=layout.world_size)


def finalize_sharded_buffers() -> list[list[list[float]]]:
    """For force_all_reduce=True, False and None: what each data-parallel shard of the gradient buffer holds."""
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    modules = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(dp=2)}
    with tiny_world(modules, ddp=ddp) as (infra, model):
        pairs = get_module_to_grid_tuple(model, infra)
        ((module, _),) = pairs
        (buffer,) = module.buffers
        shards = []
        for force in (True, False, None):
            buffer.grad_data.fill_(dist.get_rank() + 1)
            finalize_model_grads_multimodule([model], force_all_reduce=force, infra=infra, module_to_grid_tuple=pairs)
            shards.append([shard.unique().tolist() for shard in buffer.grad_data.chunk(2)])
        return shards


def test_force_all_reduce_is_passed_on(rank_pool: RankPool) -> None:
    """Sums over two replicas, divided by two language replicas; a shard that is not reduced keeps its rank's part."""
    per_rank = rank_pool.run(finalize_sharded_buffers, world_size=4)
    forced, not_forced, by_default = zip(*per_rank, strict=True)
    assert forced == ([[1.5], [1.5]], [[1.5], [1.5]], [[3.5], [3.5]], [[3.5], [3.5]])
    assert not_forced == by_default == ([[1.5], [0.5]], [[1.0], [1.5]], [[3.5], [1.5]], [[2.0], [3.5]])


def finalize_sequence_parallel_gradients() -> dict[str, list[float]]:
    """The gradient of one parameter per module that sees another part of the sequence on each tensor-parallel rank."""
    modules = {"images": ModuleParallelism(tp=4), "language": ModuleParallelism(tp=2, dp=2)}
    with tiny_world(modules, colocate=True, ddp=DistributedDataParallelConfig()) as (infra, model):
        parameters = {}
        for name in modules:
            module, _ = module_and_name(model, name)
            module.config.sequence_parallel = True
            parameters[name] = next(module.parameters())
            parameters[name].sequence_parallel = True
            parameters[name].main_grad.fill_(dist.get_rank() + 1)
        pairs = get_module_to_grid_tuple(model, infra)
        finalize_model_grads_multimodule([model], infra=infra, module_to_grid_tuple=pairs)
        return {name: parameter.main_grad.unique().tolist() for name, parameter in parameters.items()}


def test_each_module_has_its_own_tensor_parallel_group(rank_pool: RankPool) -> None:
    """Both sums go over all four ranks, over tp=4 or over tp=2 and dp=2, and are divided by two language replicas."""
    reduced = rank_pool.run(finalize_sequence_parallel_gradients, world_size=4)
    assert reduced == [{"images": [5.0], "language": [5.0]}] * 4


def zero_filled_buffers(layout: Layout) -> dict[str, set[float]]:
    """All numbers that are left in the gradients of each module."""
    ddp = DistributedDataParallelConfig()
    with tiny_world(layout.modules, colocate=layout.colocate, ddp=ddp) as (infra, model):
        for gradient in gradients(model, infra):
            gradient.values.fill_(gradient.number)
        pairs = get_module_to_grid_tuple(model, infra)
        not_wrapped = (nn.Linear(1, 1), pairs[0][1])
        zero_grad_buffer_for_multimodule([*pairs, not_wrapped])
        left: dict[str, set[float]] = {name: set() for name in infra.participating_modules}
        for gradient in gradients(model, infra):
            left[gradient.module].update(gradient.values.unique().tolist())
        return left


def test_zeroed_buffers(rank_pool: RankPool) -> None:
    layout = LAYOUTS["colocated-language_tp2_dp2-images_dp4"]
    assert rank_pool.run(zero_filled_buffers, layout, world_size=4) == [{"images": {0.0}, "language": {0.0}}] * 4


# ---- checks of the set-up ----


def check_stub_ranks() -> None:
    with tiny_world(TWO_RANKS) as (infra, _):
        grids = infra.module_to_grid_map
        validate_no_stub_ranks(grids, 2)
        with pytest.raises(ValueError, match=r"Ranks \[2, 3\] of 4 .*images on ranks 0-0.*Run 2 processes"):
            validate_no_stub_ranks(grids, 4)
        with pytest.raises(ValueError, match=r"Ranks \[0\] of 2 .*\(language on ranks 1-1\)"):
            validate_no_stub_ranks({LANGUAGE: grids[LANGUAGE]}, 2)
    with tiny_world(TWO_RANKS, colocate=True) as (infra, _):
        validate_no_stub_ranks(infra.module_to_grid_map, 2)


def test_stub_ranks_are_named(rank_pool: RankPool) -> None:
    rank_pool.run(check_stub_ranks, world_size=2)


def check_data_loader_contract() -> None:
    different_dp = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism()}
    with tiny_world(different_dp) as (infra, _):
        check = partial(validate_data_loader_contract, infra)
        check(8, {"images": 2, "language": 4}, 2)
        with pytest.raises(ValueError, match=r"'images': global_batch_size=7 is not a multiple of dp=2\. Use 8"):
            check(7, {"images": 2, "language": 4}, 2)
        with pytest.raises(ValueError, match=r"'language' has no entry in micro_batch_size, which has 'images'\."):
            check(8, {"images": 2}, 2)
        with pytest.raises(ValueError, match=r"'images': .* = 2 \* 1 = 2, but .* = 8 / 2 = 4\. Change one"):
            check(8, {"images": 1, "language": 4}, 2)
        # One number cannot suit two different dp sizes.
        with pytest.raises(ValueError, match=r"'language': .* = 2 \* 2 = 4, but .* = 8 / 1 = 8\. Change one"):
            check(8, 2, 2)
    same_dp = {"images": ModuleParallelism(dp=3), "language": ModuleParallelism(dp=3)}
    with tiny_world(same_dp, colocate=True) as (infra, _):
        check = partial(validate_data_loader_contract, infra)
        check(12, 2, 2)
        check(12, {"images": 2, "language": 2, "audio": 7}, 2)
        with pytest.raises(ValueError, match=r"global_batch_size=8 is not a multiple of dp=3\. Use 9"):
            check(8, 2, 2)
        with pytest.raises(ValueError, match=r" = 3 \* 2 = 6, but .* = 12 / 3 = 4\. Change one"):
            check(12, 2, 3)


def test_data_loader_contract(rank_pool: RankPool) -> None:
    rank_pool.run(check_data_loader_contract, world_size=3)

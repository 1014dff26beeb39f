"""The nine functions for process groups and gradients of modules that each have their own HyperCommGrid.

They have the names and signatures of the reference page of ``mimo_parallel_utils`` for MIMO heterogeneous parallel
training. Their ``infra`` is a :class:`lightning_mimo.parallel.infra.MimoModelInfra`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo import MimoModel
from megatron.core.process_groups_config import MultiModuleProcessGroupCollection
from megatron.core.utils import get_model_config

from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.observe.spans import SpanInfo
from lightning_mimo.parallel.infra import MimoModelInfra

logger = logging.getLogger(__name__)


def unwrap_mimo_model(model: torch.nn.Module) -> MimoModel:
    """Return the MimoModel inside ``Float16Module`` and ``DistributedDataParallel`` wrappers.

    Args:
        model: a MimoModel, or a MimoModel inside any number of wrappers with an attribute ``module``.

    Raises:
        RuntimeError: if there is no MimoModel inside.
    """
    inner = model
    while not isinstance(inner, MimoModel):
        wrapped = getattr(inner, "module", None)
        if wrapped is None:
            raise RuntimeError(
                f"No MimoModel inside {type(model).__name__}: the innermost module is a {type(inner).__name__}."
            )
        inner = wrapped
    return inner


def is_current_rank_in_grid(grid: HyperCommGrid) -> bool:
    """Whether a grid contains this rank. torch.distributed must be initialized."""
    return grid.rank_offset <= dist.get_rank() < grid.rank_offset + grid.size


def get_module_to_grid_tuple(
    mimo_model: MimoModel, infra: MimoModelInfra
) -> list[tuple[torch.nn.Module, HyperCommGrid]]:
    """Pair every module of this rank with its grid, the language module last.

    Args:
        mimo_model: the model, wrapped or not; its modules may be wrapped individually.
        infra: grids by module name.

    Returns:
        ``(module, grid)`` for each module of this rank, in the order of ``infra.module_to_grid_map`` with ``language``
        last.
    """
    model = unwrap_mimo_model(mimo_model)
    pairs = []
    for name in sorted(infra.module_to_grid_map, key=lambda name: name == LANGUAGE):
        grid = infra.module_to_grid_map[name]
        if not is_current_rank_in_grid(grid):
            continue
        module = model.language_model if name == LANGUAGE else model.modality_submodules[name]
        if module is not None:
            pairs.append((module, grid))
    return pairs


def build_pg_collection_for_schedule(infra: MimoModelInfra) -> MultiModuleProcessGroupCollection:
    """Collect the process groups of this rank's modules in the form that Megatron's schedules expect.

    It uses the groups in ``infra.pg_collections`` and creates none. On ranks without the language module,
    ``language_model_module_name`` is ``None``. megatron-core 0.17 and later allow this, so the list of collections that
    the reference page has as a fallback is not needed.
    """
    return MultiModuleProcessGroupCollection(
        module_pgs=dict(infra.pg_collections),
        language_model_module_name=LANGUAGE if LANGUAGE in infra.pg_collections else None,
    )


@contextmanager
def multimodule_no_sync(*, module_to_grid_tuple: list[tuple[torch.nn.Module, HyperCommGrid]]) -> Iterator[None]:
    """Context in which gradients of DDP-wrapped modules are accumulated but not reduced.

    The schedule enters it without arguments around all microbatches except the last. Bind the list with
    ``functools.partial`` and set the result as ``config.no_sync_func``.
    """
    with ExitStack() as stack:
        for module, _ in module_to_grid_tuple:
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


def finalize_model_grads_multimodule(
    model: Any,
    num_tokens: torch.Tensor | None = None,
    pg_collection: Any = None,
    force_all_reduce: bool | None = None,
    *,
    infra: MimoModelInfra,
    module_to_grid_tuple: list[tuple[torch.nn.Module, HyperCommGrid]],
) -> None:
    """Reduce the gradients of every module over the module's own process groups, and scale them.

    The signature is that of ``config.finalize_model_grads_func``, which the schedule calls. Bind ``infra`` and
    ``module_to_grid_tuple`` with ``functools.partial``. Collective over the world.

    Afterwards all modules have the gradient of the same loss:

    - With ``num_tokens`` it is (sum of token losses) / (loss tokens of the global batch). Only the last language stage
      knows the count, so it is summed over all ranks here, which also gives it to the encoders.
    - Without ``num_tokens`` it is the mean over language replicas of the losses that the schedule computed.

    The gradient of an encoder is the sum over its replicas, whatever the number of language replicas. If its DDP
    wrapper averages, the average is converted to a sum.

    ``MimoStrategy`` uses the same :func:`reduce_gradients`, :func:`gradient_scale` and :func:`scale_gradients`. It sums
    the token count in one collective together with the other sums of a step.

    Args:
        model: ignored; the modules come from ``module_to_grid_tuple``.
        num_tokens: scalar tensor, the number of loss tokens of this rank's microbatches; ignored on ranks that do not
            compute the loss. If the sum is 0, gradients are not divided. ``None`` if the loss is not per token.
            Megatron's schedules count integers; with a floating-point dtype the count may be a fraction.
        pg_collection: ignored; each module has its own in ``infra.pg_collections``.
        force_all_reduce: passed to each module: all-reduce even if the distributed optimizer would reduce-scatter.
        infra: process groups by module name.
        module_to_grid_tuple: result of :func:`get_module_to_grid_tuple`.
    """
    total = None if num_tokens is None else _sum_over_ranks(num_tokens, infra)
    reduce_gradients(infra, module_to_grid_tuple, force_all_reduce=bool(force_all_reduce))
    scale = 1 / infra.layout.modules[LANGUAGE].dp if total is None else gradient_scale(total)
    scale_gradients(infra, module_to_grid_tuple, scale)


def reduce_gradients(
    infra: MimoModelInfra,
    module_to_grid_tuple: list[tuple[torch.nn.Module, HyperCommGrid]],
    *,
    force_all_reduce: bool = False,
) -> None:
    """Reduce the gradients of every module over the module's own process groups, without scaling.

    Collective over the groups of each module.
    """
    for name, module in _by_name(infra, module_to_grid_tuple):
        groups = infra.pg_collections[name]
        replicas = tuple(rank for rank in dist.get_process_group_ranks(groups.dp_cp) if rank != dist.get_rank())
        info = SpanInfo(kind="reduce", label=f"reduce the gradients of {name}", module=name, peers=replicas)
        with infra.spans.span(info):
            finalize_model_grads([module], None, pg_collection=groups, force_all_reduce=force_all_reduce)


def loss_divisor[Number: (torch.Tensor, float)](tokens: Number) -> Number:
    """Divisor of a sum of token losses: the number of loss tokens, or 1 if there are none.

    Args:
        tokens: number of loss tokens over all ranks, as a number or a floating-point tensor of any shape. It may be a
            fraction.
    """
    return tokens + (tokens == 0)


def gradient_scale(tokens: torch.Tensor, loss_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Factor that converts the gradients of a sum of token losses to gradients of the mean loss.

    Args:
        tokens: float64 scalar, the number of loss tokens of all accumulated batches, over all ranks.
        loss_scale: scalar by which the loss was multiplied before the backward pass; ``None`` means 1.

    Returns:
        float64 scalar tensor. NaN for a negative number of tokens, which would reverse the sign of the gradients. As it
        has no dimensions, multiplying gradients by it keeps their dtype.
    """
    scale = loss_divisor(tokens).reciprocal().masked_fill(tokens < 0, math.nan)
    return scale if loss_scale is None else scale / loss_scale.to(scale.dtype).reshape(())


def scale_gradients(
    infra: MimoModelInfra,
    module_to_grid_tuple: list[tuple[torch.nn.Module, HyperCommGrid]],
    scale: torch.Tensor | float,
) -> None:
    """Multiply the reduced gradients of every module by a factor.

    Megatron's DDP sums over replicas if the loss is per token, and averages otherwise. An average is converted to a sum
    first.

    Args:
        infra: layout and grids.
        module_to_grid_tuple: result of :func:`get_module_to_grid_tuple`.
        scale: factor for the sum over a module's replicas.
    """
    for name, module in _by_name(infra, module_to_grid_tuple):
        is_sum = get_model_config(module).calculate_per_token_loss
        module.scale_gradients(scale if is_sum else scale * infra.layout.modules[name].dp)


def zero_grad_buffer_for_multimodule(module_to_grid_tuple: list[tuple[torch.nn.Module, HyperCommGrid]]) -> None:
    """Zero the gradient buffers of all DDP-wrapped modules."""
    for module, _ in module_to_grid_tuple:
        if isinstance(module, DistributedDataParallel):
            module.zero_grad_buffer()


def validate_no_stub_ranks(module_to_grid_map: dict[str, HyperCommGrid], world_size: int) -> None:
    """Check that every rank belongs to a module.

    Raises:
        ValueError: naming the ranks that do not.
    """
    covered: set[int] = set()
    for grid in module_to_grid_map.values():
        covered.update(range(grid.rank_offset, grid.rank_offset + grid.size))
    stubs = sorted(set(range(world_size)) - covered)
    if stubs:
        spans = ", ".join(
            f"{name} on ranks {grid.rank_offset}-{grid.rank_offset + grid.size - 1}"
            for name, grid in module_to_grid_map.items()
        )
        raise ValueError(
            f"Ranks {stubs} of {world_size} belong to no module ({spans}). Run {world_size - len(stubs)} processes, or "
            f"give a module more ranks."
        )


def validate_data_loader_contract(
    infra: MimoModelInfra,
    global_batch_size: int,
    micro_batch_size: int | Mapping[str, int],
    num_microbatches: int,
) -> None:
    """Check that the batch sizes agree with the data parallelism of every module.

    Example: with ``global_batch_size=8`` and ``num_microbatches=2``, a module with dp=2 needs ``micro_batch_size=2``.

    Args:
        infra: grids by module name.
        global_batch_size: samples per step over all data-parallel ranks.
        micro_batch_size: samples per microbatch and data-parallel rank: one number for all modules, or a mapping from
            module name to number.
        num_microbatches: microbatches per step.

    Raises:
        ValueError: if ``global_batch_size`` is not a multiple of a module's dp size, if a module's micro batch size is
            missing, or if ``num_microbatches * micro_batch_size != global_batch_size / dp``.
    """
    for name, grid in infra.module_to_grid_map.items():
        dp = grid.shape[grid.dim_names.index("dp")]
        if global_batch_size % dp:
            raise ValueError(
                f"Module {name!r}: global_batch_size={global_batch_size} is not a multiple of dp={dp}. Use "
                f"{(global_batch_size // dp + 1) * dp}, or another dp."
            )
        size = _micro_batch_size_of(name, micro_batch_size)
        per_replica = global_batch_size // dp
        if num_microbatches * size != per_replica:
            raise ValueError(
                f"Module {name!r}: num_microbatches * micro_batch_size = {num_microbatches} * {size} = "
                f"{num_microbatches * size}, but global_batch_size / dp = {global_batch_size} / {dp} = {per_replica}. "
                f"Change one of these four numbers so that the two sides agree."
            )


def _by_name(
    infra: MimoModelInfra, module_to_grid_tuple: list[tuple[torch.nn.Module, HyperCommGrid]]
) -> list[tuple[str, DistributedDataParallel]]:
    """Name and module of each pair. All modules whose gradients are reduced or scaled are wrapped in DDP."""
    names = {id(grid): name for name, grid in infra.module_to_grid_map.items()}
    return [(names[id(grid)], module) for module, grid in module_to_grid_tuple]


def _micro_batch_size_of(name: str, micro_batch_size: int | Mapping[str, int]) -> int:
    if not isinstance(micro_batch_size, Mapping):
        return micro_batch_size
    if name not in micro_batch_size:
        raise ValueError(
            f"Module {name!r} has no entry in micro_batch_size, which has {', '.join(map(repr, micro_batch_size))}."
        )
    return micro_batch_size[name]


def _sum_over_ranks(num_tokens: torch.Tensor, infra: MimoModelInfra) -> torch.Tensor:
    """Sum of the token counts of all language replicas, float64 scalar. Collective over the world."""
    total = torch.zeros((), dtype=torch.float64, device=num_tokens.device)
    if infra.layout.counts_loss(dist.get_rank()):
        total += num_tokens.to(torch.float64).reshape(())
    dist.all_reduce(total)
    return total

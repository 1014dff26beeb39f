"""Layout-independent initialization: initial weights depend only on the seed and the parameter's global name.

megatron-core draws each shard from a generator whose state depends on the tensor-parallel rank and on the modules that
were built before, so initial weights differ between layouts. Here :class:`RecordInitializers` records the random
initializers that run while a model is built. Afterwards each one is replayed on the parameter's full, unsharded shape
with a generator seeded by the parameter's global name, and the rank keeps its shard of the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from lightning_mimo.mimo.buffers import persistent_buffers
from lightning_mimo.parallel.random import seed_for


def fan_in_normal_(tensor: torch.Tensor, *, gain: float = 1.0) -> torch.Tensor:
    """Fill a weight ``[out, in]`` with a normal distribution of standard deviation gain / sqrt(in).

    Like ``torch.nn.init.kaiming_normal_``, but it supports torch's override protocol, so that ``in`` is the size of the
    unsharded weight. Any other initializer whose scale depends on the shape must do the same.
    """
    if has_torch_function_unary(tensor):
        return handle_torch_function(fan_in_normal_, (tensor,), tensor, gain=gain)
    with torch.no_grad():
        return tensor.normal_(std=gain / math.sqrt(tensor.size(1)))


RANDOM_INITIALIZERS = frozenset(
    {
        fan_in_normal_,
        torch.nn.init.normal_,
        torch.nn.init.uniform_,
        torch.nn.init.kaiming_uniform_,
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
    }
)
"""Functions that fill the tensor they are given first, ``tensor``, with random values, and return it."""


@dataclass(frozen=True)
class _Recipe:
    """A recorded initializer call without its tensor, and a fingerprint of the tensor right after the call."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fingerprint: tuple[float, float]


class RecordInitializers(TorchFunctionMode):
    """Records the random initializers that are called on parameters while a model is built.

    The initializers run as usual, so later changes to a parameter can be detected (the zero row of a padded embedding,
    the further steps of ``trunc_normal_``). A parameter that was changed keeps the values with which it was built.
    """

    def __init__(self) -> None:
        super().__init__()
        self._recipes: dict[int, tuple[torch.nn.Parameter, _Recipe]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in RANDOM_INITIALIZERS:
            tensor = args[0] if args else kwargs.get("tensor")
            # transformers builds on the meta device before it loads; there is nothing to replay on those parameters.
            if isinstance(tensor, torch.nn.Parameter) and not tensor.is_meta:
                rest = {key: value for key, value in kwargs.items() if key not in ("tensor", "generator")}
                # The reference to the parameter ensures that its id is not reused.
                self._recipes[id(tensor)] = (tensor, _Recipe(func, args[1:], rest, _fingerprint(tensor)))
        return result

    def recipe_of(self, parameter: torch.nn.Parameter) -> _Recipe | None:
        """The random initializer whose result a parameter still holds; ``None`` if there is none."""
        _, recipe = self._recipes.get(id(parameter), (None, None))
        return recipe if recipe is not None and recipe.fingerprint == _fingerprint(parameter) else None


@torch.no_grad()
def _fingerprint(tensor: torch.Tensor) -> tuple[float, float]:
    # The version counter is not sufficient: it does not count changes through ``tensor.data``.
    values = tensor.double()
    return float(values.sum()), float(values.square().sum())


@torch.no_grad()
def initialize_by_name(
    module: torch.nn.Module,
    *,
    prefix: str,
    seed: int,
    initializers: RecordInitializers,
    groups: ProcessGroupCollection,
    under: Sequence[str] | None = None,
) -> None:
    """Fill the parameters of one module with values that do not depend on the layout.

    Collective over ``groups.embd`` if word embeddings are tied across pipeline stages.

    Args:
        module: the module, built under ``initializers`` and not yet wrapped.
        prefix: its global name, e.g. ``language_model``.
        seed: the run's seed.
        initializers: initializers recorded while the module was built.
        groups: process groups of the module, whose ranks determine the tensor-parallel shards.
        under: names, which begin with ``prefix``, of the submodules that are filled; ``None`` for the whole module.
    """
    for name, parameter in global_named_parameters(module, prefix=prefix, groups=groups):
        if under is not None and not any(f"{name}.".startswith(f"{each}.") for each in under):
            continue
        recipe = initializers.recipe_of(parameter)
        if recipe is not None:
            parameter.copy_(_shard_of_master(parameter, recipe, seed_for(seed, name), groups))
        if getattr(parameter, "shared_embedding", False):
            # The last stage's copy of tied embeddings still holds the first stage's values from before this function.
            dist.broadcast(parameter.data, group=groups.embd, group_src=0)


def global_named_parameters(
    module: torch.nn.Module, *, prefix: str, groups: ProcessGroupCollection
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters with names that are the same in every layout.

    Layers are numbered over all pipeline stages and experts over all expert-parallel ranks. The copy of tied word
    embeddings on the last pipeline stage has the same name as the original on the first stage.
    """
    renamed = _renamed_paths(module, groups)
    for name, parameter in module.named_parameters():
        if getattr(parameter, "shared_embedding", False):
            name = "embedding.word_embeddings.weight"
        yield f"{prefix}.{_rename(name, renamed)}", parameter


def global_named_buffers(
    module: torch.nn.Module, *, prefix: str, groups: ProcessGroupCollection
) -> Iterator[tuple[str, torch.Tensor]]:
    """Persistent buffers with names that are the same in every layout, as :func:`global_named_parameters`."""
    renamed = _renamed_paths(module, groups)
    for name, buffer in persistent_buffers(module):
        yield f"{prefix}.{_rename(name, renamed)}", buffer


def _renamed_paths(module: torch.nn.Module, groups: ProcessGroupCollection) -> dict[str, str]:
    """Path of a layer or expert in this module -> its path in the whole model."""
    renamed = {}
    for path, layer in module.named_modules():
        if re.search(r"(^|\.)layers\.\d+$", path) and hasattr(layer, "layer_number"):
            renamed[path] = f"{path.rpartition('.')[0]}.{layer.layer_number - 1}"
        local_experts = getattr(layer, "local_experts", None)
        if local_experts is not None:
            first = groups.ep.rank() * len(local_experts)
            for i in range(len(local_experts)):
                renamed[f"{path}.local_experts.{i}"] = f"{path}.local_experts.{first + i}"
    return renamed


def _rename(name: str, renamed: dict[str, str]) -> str:
    parts = name.split(".")
    path, result = "", ""
    for part in parts:
        path = f"{path}.{part}" if path else part
        last = renamed[path].rpartition(".")[2] if path in renamed else part
        result = f"{result}.{last}" if result else last
    return result


def shard_group(parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> dist.ProcessGroup | None:
    """The group over which a parameter is sharded, or None if each rank holds the full parameter."""
    group = groups.tp if getattr(parameter, "allreduce", True) else groups.expt_tp
    return group if getattr(parameter, "tensor_model_parallel", False) and group.size() > 1 else None


def partition_of(parameter: Any) -> tuple[int, int]:
    """Dimension and stride in which tensor parallelism shards a parameter, as megatron-core sets them on it."""
    return parameter.partition_dim, parameter.partition_stride


def cut_shard(master: torch.Tensor, parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> torch.Tensor:
    """Return this rank's shard of a full parameter."""
    group = shard_group(parameter, groups)
    if group is None:
        return master
    dim, stride = partition_of(parameter)
    return cut_evenly(master, dim=dim, stride=stride, rank=group.rank(), size=group.size())


def cut_evenly(whole: torch.Tensor, *, dim: int, stride: int, rank: int, size: int) -> torch.Tensor:
    """Return one of ``size`` tensor-parallel shards.

    Example: with stride 2 and size 2, rank 0 of the rows ``[a, b, c, d]`` holds ``[a, c]``.

    Args:
        whole: the full tensor.
        dim: dimension along which it is sharded.
        stride: number of matrices that are concatenated along ``dim`` and sharded separately (2 for gated MLPs).
        rank: index of the shard.
        size: number of shards.
    """
    pieces = whole.chunk(size * stride, dim=dim)
    return torch.cat(pieces[rank::size], dim=dim)


def _shard_of_master(
    parameter: torch.nn.Parameter, recipe: _Recipe, seed: int, groups: ProcessGroupCollection
) -> torch.Tensor:
    """Run a recipe on the unsharded shape, in float32 on the CPU, and return this rank's shard of the result."""
    shape = list(parameter.shape)
    if (group := shard_group(parameter, groups)) is not None:
        dim, _ = partition_of(parameter)
        shape[dim] *= group.size()
    # Explicitly on the CPU: Lightning makes the GPU the default device, whose generator draws different numbers.
    master = torch.empty(shape, dtype=torch.float32, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        recipe.function(master, *recipe.args, **recipe.kwargs)
    return cut_shard(master, parameter, groups)

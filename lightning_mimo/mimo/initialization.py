"""The same start in every layout: initial weights depend on the seed and the parameter's global name only.

megatron-core draws each shard from a generator whose state depends on the tensor-parallel rank and on what was built
before, so another layout starts from other weights. Here the random initializers that run while a model is built are
noted (:class:`RecordInitializers`); afterwards each one is replayed on the parameter's full, unsharded
shape with a generator seeded by the parameter's global name, and the rank's shard is cut out of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from lightning_mimo.parallel.random import seed_for


def fan_in_normal_(tensor: torch.Tensor, *, gain: float = 1.0) -> torch.Tensor:
    """Fill a weight ``[out, in]`` with a normal distribution of standard deviation gain / sqrt(in).

    Like ``torch.nn.init.kaiming_normal_``, but it takes part in torch's override protocol, so that the ``in`` of the
    unsharded weight counts. Any other initializer whose scale depends on the shape has to do the same.
    """
    if has_torch_function_unary(tensor):
        return handle_torch_function(fan_in_normal_, (tensor,), tensor, gain=gain)
    with torch.no_grad():
        return tensor.normal_(std=gain / math.sqrt(tensor.size(1)))


_RANDOM_INITIALIZERS = frozenset(
    {
        fan_in_normal_,
        torch.nn.init.normal_,
        torch.nn.init.uniform_,
        torch.nn.init.kaiming_uniform_,
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
    }
)


@dataclass(frozen=True)
class _Recipe:
    """A noted initializer call, without the tensor, and what the tensor was right after it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fingerprint: tuple[float, float]


class RecordInitializers(TorchFunctionMode):
    """Notes the random initializers that are called on parameters while a model is built.

    They are run as well: what is done to a parameter afterwards (the zero row of a padded embedding, the further steps
    of ``trunc_normal_``) is then found out, and such a parameter is left as it was built.
    """

    def __init__(self) -> None:
        super().__init__()
        self._recipes: dict[int, tuple[torch.nn.Parameter, _Recipe]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _RANDOM_INITIALIZERS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.nn.Parameter):
                rest = {key: value for key, value in kwargs.items() if key not in ("tensor", "generator")}
                # The parameter is kept too, so that its id is not given to another one.
                self._recipes[id(tensor)] = (tensor, _Recipe(func, args[1:], rest, _fingerprint(tensor)))
        return result

    def recipe_of(self, parameter: torch.nn.Parameter) -> _Recipe | None:
        """The random initializer whose outcome a parameter still is, if there is one."""
        _, recipe = self._recipes.get(id(parameter), (None, None))
        return recipe if recipe is not None and recipe.fingerprint == _fingerprint(parameter) else None


@torch.no_grad()
def _fingerprint(tensor: torch.Tensor) -> tuple[float, float]:
    # Not the version counter: a change through ``tensor.data`` does not count there.
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
) -> None:
    """Fill the parameters of one module with values that no layout can change.

    Args:
        module: the module, as built under ``initializers``; not yet wrapped.
        prefix: its global name, e.g. ``language_model``.
        seed: the run's seed.
        initializers: what was noted while it was built.
        groups: its process groups; tensor-parallel shards are cut by their ranks. Collective over ``embd`` where word
            embeddings are tied across pipeline stages.
    """
    for name, parameter in global_named_parameters(module, prefix=prefix, groups=groups):
        recipe = initializers.recipe_of(parameter)
        if recipe is not None:
            parameter.copy_(_shard_of_master(parameter, recipe, seed_for(seed, name), groups))
        if getattr(parameter, "shared_embedding", False):
            # The last stage's copy of tied embeddings was filled with what the first stage held before.
            dist.broadcast(parameter.data, group=groups.embd, group_src=0)


def global_named_parameters(
    module: torch.nn.Module, *, prefix: str, groups: ProcessGroupCollection
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """``named_parameters`` with names that are the same in every layout.

    Layers are numbered over all pipeline stages and experts over all expert-parallel ranks. The copy of tied word
    embeddings on the last pipeline stage has the name of the first stage's.
    """
    renamed = {}
    for path, layer in module.named_modules():
        if re.search(r"(^|\.)layers\.\d+$", path) and hasattr(layer, "layer_number"):
            renamed[path] = f"{path.rpartition('.')[0]}.{layer.layer_number - 1}"
        local_experts = getattr(layer, "local_experts", None)
        if local_experts is not None:
            first = groups.ep.rank() * len(local_experts)
            for i in range(len(local_experts)):
                renamed[f"{path}.local_experts.{i}"] = f"{path}.local_experts.{first + i}"
    for name, parameter in module.named_parameters():
        if getattr(parameter, "shared_embedding", False):
            name = "embedding.word_embeddings.weight"
        yield f"{prefix}.{_rename(name, renamed)}", parameter


def _rename(name: str, renamed: dict[str, str]) -> str:
    parts = name.split(".")
    path, result = "", ""
    for part in parts:
        path = f"{path}.{part}" if path else part
        last = renamed[path].rpartition(".")[2] if path in renamed else part
        result = f"{result}.{last}" if result else last
    return result


def shard_group(parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> dist.ProcessGroup | None:
    """The group over which a parameter is cut into shards, or None where each rank holds the whole."""
    group = groups.tp if getattr(parameter, "allreduce", True) else groups.expt_tp
    return group if getattr(parameter, "tensor_model_parallel", False) and group.size() > 1 else None


def partition_of(parameter: Any) -> tuple[int, int]:
    """Dimension and stride in which tensor parallelism cuts a parameter: what megatron-core writes onto it."""
    return parameter.partition_dim, parameter.partition_stride


def cut_shard(master: torch.Tensor, parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> torch.Tensor:
    """This rank's shard of a whole parameter."""
    group = shard_group(parameter, groups)
    if group is None:
        return master
    dim, stride = partition_of(parameter)
    return cut_evenly(master, dim=dim, stride=stride, rank=group.rank(), size=group.size())


def cut_evenly(whole: torch.Tensor, *, dim: int, stride: int, rank: int, size: int) -> torch.Tensor:
    """One of ``size`` tensor-parallel shards.

    Args:
        whole: the whole tensor.
        dim: along which it is cut.
        stride: above 1, several matrices lie one after the other along ``dim``, each cut on its own (gated MLPs).
        rank: which shard.
        size: how many there are.
    """
    pieces = whole.chunk(size * stride, dim=dim)
    return torch.cat(pieces[rank::size], dim=dim)


def _shard_of_master(
    parameter: torch.nn.Parameter, recipe: _Recipe, seed: int, groups: ProcessGroupCollection
) -> torch.Tensor:
    """Run a recipe on the unsharded shape, in float32 on the CPU, and cut this rank's shard out of it."""
    shape = list(parameter.shape)
    if (group := shard_group(parameter, groups)) is not None:
        dim, _ = partition_of(parameter)
        shape[dim] *= group.size()
    # Named, because Lightning makes the GPU the default device, whose generator draws other numbers.
    master = torch.empty(shape, dtype=torch.float32, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        recipe.function(master, *recipe.args, **recipe.kwargs)
    return cut_shard(master, parameter, groups)

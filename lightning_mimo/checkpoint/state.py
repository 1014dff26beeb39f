"""Converts a rank's weights, main parameters and optimizer state to shards, and loads them from shards."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer

from lightning_mimo.checkpoint.shards import MAIN, WEIGHT, ShardSpec
from lightning_mimo.errors import CheckpointError
from lightning_mimo.mimo.model import RaggedMimoModel
from lightning_mimo.mimo.parameter_names import named_buffers_of, named_parameters_of
from lightning_mimo.optim.mimo_optimizer import SingleSyncMimoOptimizer
from lightning_mimo.parallel.infra import MimoModelInfra

_OR_ONLY_WEIGHTS = "resume with the same value of frozen, or begin a new run from the weights"


@dataclass(frozen=True, kw_only=True)
class TensorShard:
    """A tensor in a checkpoint file.

    Attributes:
        name: global name of the parameter.
        kind: which of its tensors: ``weight``, ``main`` or a name of optimizer state, such as ``exp_avg``.
        spec: position in the full tensor.
        tensor: the elements, flat.
    """

    name: str
    kind: str
    spec: ShardSpec
    tensor: torch.Tensor


class Reader(Protocol):
    """Source of shards."""

    def kinds(self, name: str) -> set[str]:
        """Kinds that exist for a parameter; empty if there is no such parameter."""

    def read(self, name: str, kind: str, spec: ShardSpec) -> torch.Tensor:
        """Read the elements of a tensor that a spec describes, flat, on the CPU."""


class CheckedReader(Reader, Protocol):
    """Source of shards that can be checked before they are read."""

    def check(self, name: str, kind: str) -> None:
        """Raise a CheckpointError if the shards of a tensor do not cover it."""

    def dtype(self, name: str, kind: str) -> str:
        """Dtype of a tensor as safetensors names it."""


@dataclass(frozen=True, kw_only=True)
class _Updated:
    """The tensor that an optimizer updates for a parameter.

    Attributes:
        main: the updated tensor: the parameter, a float32 copy, or a range of elements of either.
        optimizer: torch's optimizer, whose state has ``main`` as its key.
        start: first element of the flattened parameter that ``main`` holds.
        stop: one past the last element.
        is_copy: whether ``main`` is a copy of higher precision than the parameter.
        is_shared_out: whether each replica holds a different range (distributed optimizer).
    """

    main: torch.Tensor
    optimizer: torch.optim.Optimizer
    start: int
    stop: int
    is_copy: bool
    is_shared_out: bool


def shards_of(
    model: RaggedMimoModel, infra: MimoModelInfra, module: str, optimizer: SingleSyncMimoOptimizer | None
) -> Iterator[TensorShard]:
    """Yield the shards that this rank writes for one of its modules, as views.

    All replicas together write every element once.

    Args:
        model: the model, wrapped in DDP or not, with gathered parameters (see ``complete_gathering``).
        infra: process groups.
        module: name of a module of this rank.
        optimizer: optimizer whose state is saved; ``None`` saves weights only.
    """
    groups = infra.pg_collections[module]
    updated = {} if optimizer is None else _updated(optimizer, module)
    for i, (name, parameter) in enumerate(named_parameters_of(model, infra, module)):
        if getattr(parameter, "shared", False):
            continue  # the last pipeline stage's copy of tied embeddings
        replicas = groups.dp if getattr(parameter, "allreduce", True) else groups.expt_dp
        is_mine = replicas.rank() == i % replicas.size()
        spec = ShardSpec.of(parameter, groups)
        if is_mine:
            yield TensorShard(name=name, kind=WEIGHT, spec=spec, tensor=parameter.detach().reshape(-1))
        held = updated.get(id(parameter))
        if held is not None and (is_mine or held.is_shared_out):
            run = replace(spec, start=held.start, stop=held.stop)
            if held.is_copy:
                yield TensorShard(name=name, kind=MAIN, spec=run, tensor=held.main.detach().reshape(-1))
            for kind, value in held.optimizer.state.get(held.main, {}).items():
                yield _state_shard(name, kind, value, run)
    if groups.dp.rank() == 0:
        for name, buffer in named_buffers_of(model, infra, module):
            yield TensorShard(name=name, kind=WEIGHT, spec=_whole(buffer), tensor=buffer.detach().reshape(-1))


def problems_of_shards(
    model: RaggedMimoModel,
    infra: MimoModelInfra,
    reader: CheckedReader,
    optimizer: SingleSyncMimoOptimizer | None,
    *,
    has_state: bool,
) -> Iterator[str]:
    """Yield what :func:`load_shards` would not find for this rank: weights, main parameters or optimizer state.

    Args:
        model: the model.
        infra: process groups.
        reader: source of the shards.
        optimizer: optimizer to load; ``None`` checks weights only.
        has_state: whether the optimizer that was saved had updated the weights. Before that, it has no state.
    """
    for module in infra.participating_modules:
        updated = {} if optimizer is None else _updated(optimizer, module)
        named = list(named_parameters_of(model, infra, module))
        trained = [
            (reader.kinds(name), updated[id(parameter)]) for name, parameter in named if id(parameter) in updated
        ]
        all_kinds = {kind for kinds, _ in trained for kind in kinds}
        for name, parameter in named:
            kinds, held = reader.kinds(name), updated.get(id(parameter))
            needed = {WEIGHT}
            if held is not None:
                needed |= {MAIN} & all_kinds if held.is_copy else set()
                if has_state:
                    state = _kinds_of_state(held.optimizer, otherwise=all_kinds - {WEIGHT, MAIN})
                    yield from _problems_of_state(name, kinds - {WEIGHT, MAIN}, state, held.optimizer)
                    needed |= state & kinds
            elif optimizer is not None and not parameter.requires_grad and kinds - {WEIGHT, MAIN}:
                yield f"{name!r} was trained, but is frozen now; {_OR_ONLY_WEIGHTS}"
            if absent := needed - kinds:
                yield f"{name!r} has no {_listed(absent)}"
            for kind in sorted(needed & kinds):
                yield from _problem_of(reader, name, kind, is_floating_point=True)
        for name, buffer in named_buffers_of(model, infra, module):
            yield from _problem_of(reader, name, WEIGHT, is_floating_point=buffer.is_floating_point())


def _problems_of_state(name: str, found: set[str], needed: set[str], optimizer: torch.optim.Optimizer) -> Iterator[str]:
    if not found and needed:
        yield f"{name!r} has no optimizer state, because it was frozen; {_OR_ONLY_WEIGHTS}"
    elif found != needed:
        yield (
            f"{name!r} has the optimizer state {_listed(found)}, but {type(optimizer).__name__} keeps "
            f"{_listed(needed) or 'none'}; resume with the optimizer that it was saved with"
        )


def _problem_of(reader: CheckedReader, name: str, kind: str, *, is_floating_point: bool) -> Iterator[str]:
    try:
        reader.check(name, kind)
    except CheckpointError as error:
        yield str(error).rstrip(".")
    else:
        if reader.dtype(name, kind).startswith(("F", "BF")) != is_floating_point:
            expected = "floating point" if is_floating_point else "whole numbers"
            yield f"{name!r} ({kind}) has the dtype {reader.dtype(name, kind)}, but must be {expected}"


def _listed(kinds: set[str]) -> str:
    return " and ".join(sorted(kinds))


def _kinds_of_state(optimizer: torch.optim.Optimizer, *, otherwise: set[str]) -> set[str]:
    """Kinds of state that an optimizer keeps for each parameter once it has updated it.

    Args:
        optimizer: Adam or SGD of torch, Apex or Transformer Engine.
        otherwise: the result for all other optimizers.
    """
    name = type(optimizer).__name__.lower()
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return {"exp_avg", "exp_avg_sq", "step"}
    if "adam" in name:
        return {"exp_avg", "exp_avg_sq"}  # the fused kernels keep the step in the parameter group
    if "sgd" in name:
        return {"momentum_buffer"} if any(group["momentum"] for group in optimizer.param_groups) else set()
    return otherwise


def load_shards(
    model: RaggedMimoModel,
    infra: MimoModelInfra,
    reader: Reader,
    optimizer: SingleSyncMimoOptimizer | None,
    *,
    names: Container[str] | None = None,
) -> None:
    """Load this rank's weights, and optimizer state if an optimizer is given, from shards of any layout.

    Args:
        model: the model to fill.
        infra: process groups.
        reader: what to read from.
        optimizer: optimizer to fill.
        names: global names of the parameters to load, with the buffers that there are; ``None`` loads all.
    """
    for module in infra.participating_modules:
        groups = infra.pg_collections[module]
        updated = {} if optimizer is None else _updated(optimizer, module)
        for name, parameter in named_parameters_of(model, infra, module):
            if names is not None and name not in names:
                continue
            spec = ShardSpec.of(parameter, groups)
            parameter.data.copy_(_most_exact(reader, name, spec, parameter).view(parameter.shape))
            if (held := updated.get(id(parameter))) is not None:
                _load_updated(reader, name, replace(spec, start=held.start, stop=held.stop), held)
        for name, buffer in named_buffers_of(model, infra, module):
            if names is None or WEIGHT in reader.kinds(name):
                buffer.data.copy_(reader.read(name, WEIGHT, _whole(buffer)).view(buffer.shape))


def _load_updated(reader: Reader, name: str, spec: ShardSpec, held: _Updated) -> None:
    if held.is_copy:
        held.main.data.copy_(_most_exact(reader, name, spec, held.main).view(held.main.shape))
    state: dict[str, Any] = {}
    for kind in sorted(reader.kinds(name) - {WEIGHT, MAIN}):
        scalar = ShardSpec(shape=(), stop=1)
        if kind == "step":
            is_fused = any(group.get("fused") or group.get("capturable") for group in held.optimizer.param_groups)
            device = held.main.device if is_fused else torch.device("cpu")
            state[kind] = reader.read(name, kind, scalar).reshape(()).to(device)
        else:
            values = reader.read(name, kind, spec).view(held.main.shape)
            state[kind] = values.to(device=held.main.device, dtype=held.main.dtype)
    if state and spec.stop > spec.start:
        held.optimizer.state[held.main] = state


def _most_exact(reader: Reader, name: str, spec: ShardSpec, target: torch.Tensor) -> torch.Tensor:
    """Read the values of a parameter: those of its main parameter if the target has sufficient precision."""
    kind = MAIN if MAIN in reader.kinds(name) and target.dtype.itemsize > 2 else WEIGHT
    return reader.read(name, kind, spec)


def _whole(buffer: torch.Tensor) -> ShardSpec:
    return ShardSpec(shape=tuple(buffer.shape), stop=buffer.numel())


def _state_shard(name: str, kind: str, value: Any, run: ShardSpec) -> TensorShard:
    tensor = torch.as_tensor(value).detach()
    spec = ShardSpec(shape=(), stop=1) if tensor.ndim == 0 else run
    return TensorShard(name=name, kind=kind, spec=spec, tensor=tensor.reshape(-1))


def _updated(optimizer: SingleSyncMimoOptimizer, module: str) -> dict[int, _Updated]:
    """Id of a parameter of the model -> what this rank's optimizer holds of it."""
    return {id(parameter): held for each in optimizer.inner(module) for parameter, held in _updated_by(each)}


def _updated_by(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, _Updated]]:
    inner = optimizer.optimizer

    def whole(parameter: torch.nn.Parameter, main: torch.Tensor) -> tuple[torch.nn.Parameter, _Updated]:
        is_copy = main is not parameter
        stop = parameter.numel()
        return parameter, _Updated(main=main, optimizer=inner, start=0, stop=stop, is_copy=is_copy, is_shared_out=False)

    if isinstance(optimizer, DistributedOptimizer):
        for models, mains in (
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        ):
            for model_group, main_group in zip(models, mains, strict=True):
                for parameter, main in zip(model_group, main_group, strict=True):
                    run = optimizer._get_model_param_range_map(parameter)["param"]
                    yield (
                        parameter,
                        _Updated(
                            main=main,
                            optimizer=inner,
                            start=run.start,
                            stop=run.end,
                            is_copy=main.dtype != parameter.dtype,
                            is_shared_out=True,
                        ),
                    )
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        for model_group, main_group in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
            for parameter, main in zip(model_group, main_group, strict=True):
                yield whole(parameter, main)
        for group in optimizer.fp32_from_fp32_groups:
            for parameter in group:
                yield whole(parameter, parameter)
    else:
        for group in inner.param_groups:
            for parameter in group["params"]:
                yield whole(parameter, parameter)

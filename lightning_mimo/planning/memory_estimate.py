"""Estimates weights, gradients and optimizer state on every rank of a layout, in one process and without a GPU.

With torch's fake process groups this process can act as any rank of any world. On the meta device tensors have a shape
but no storage, so a model of any size is built by its own code within seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection

from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.dtypes import DtypePolicy
from lightning_mimo.mimo.initialization import shard_group
from lightning_mimo.mimo.model import RaggedMimoModel
from lightning_mimo.mimo.parameter_names import lies_under, named_parameters_of
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.planning.fake_world import Configure, as_rank, build_on_meta


@dataclass(frozen=True, kw_only=True)
class ParameterSize:
    """One parameter as one rank holds it.

    Attributes:
        numel: elements on this rank.
        itemsize: bytes per element.
        whole: elements over all ranks. The experts of all expert-parallel ranks are counted on the first one.
        trained: whether the parameter is trained, that is, not frozen.
        replicas: number of data-parallel ranks over which the distributed optimizer divides the state.
        is_expert: whether it belongs to an expert.
    """

    numel: int
    itemsize: int
    whole: int
    trained: bool
    replicas: int
    is_expert: bool


@dataclass(frozen=True, kw_only=True)
class StageFootprint:
    """Memory on each rank of one pipeline stage of one module, without activations.

    Attributes:
        module: name of the module.
        stage: pipeline stage, counted from 0.
        ranks: global ranks of the stage, which all hold the same amount.
        parameters: number of parameter elements on one rank.
        weights: bytes of the parameters.
        gradients: bytes of the gradient buffers.
        optimizer: bytes of Adam's two moments and, in mixed precision, of the float32 copy of the weights.
    """

    module: str
    stage: int
    ranks: range
    parameters: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Bytes of weights, gradients and optimizer state together."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Size of a model and memory on every rank of a layout.

    Attributes:
        parameters: module name -> number of parameter elements, each counted once.
        trained: module name -> number of trained (not frozen) parameter elements.
        stages: memory per rank, ordered by module and pipeline stage.
    """

    parameters: Mapping[str, int]
    trained: Mapping[str, int]
    stages: Sequence[StageFootprint]


def memory_estimate(
    layout: MimoLayout,
    configure: Configure,
    *,
    dtype_policy: DtypePolicy,
    ddp: Mapping[str, DistributedDataParallelConfig],
    frozen: Sequence[str] = (),
    training: bool = True,
) -> MemoryEstimate:
    """Build the model of the first and the last rank of every pipeline stage and count its parameters.

    torch.distributed must not be initialized in this process.

    Args:
        layout: resolved layout.
        configure: describes the model on a rank, as ``MimoModule.configure_mimo``. Its code must not read the values
            of weights, because they are on the meta device.
        dtype_policy: dtypes of the run.
        ddp: module name -> options of its DDP wrapper.
        frozen: names of frozen modules or prefixes of parameter names, as for ``MimoModule``.
        training: whether to count gradients and optimizer state.

    Raises:
        LayoutError: if the model does not fit the layout.
        ConfigError: if a name in ``frozen`` matches no parameter, if the ranks of a stage hold different numbers of
            parameters, or if several stages hold the same parameters.
    """
    stages = []
    first: dict[tuple[str, int], dict[str, ParameterSize]] = {}
    held = {rank: parameter_sizes(layout, rank, configure, dtype_policy) for rank in _representatives(layout)}
    for name, stage, ranks in _stages(layout):
        for rank in sorted({ranks[0], ranks[-1]}):
            sizes = frozen_sizes(held[rank][name], frozen)
            row = _count(name, stage, ranks, sizes, dtype_policy, ddp[name], training=training)
            if rank == ranks[0]:
                first[name, stage] = sizes
                stages.append(row)
            elif row != stages[-1]:
                raise ConfigError(
                    f"Module {name!r}: the ranks {ranks[0]} and {rank} of pipeline stage {stage} hold "
                    f"{stages[-1].parameters} and {row.parameters} parameters. All ranks of a stage must hold as many."
                )
    _check_frozen(frozen, [path for sizes in first.values() for path in sizes])
    whole = {name: _whole(name, first) for name in layout.modules}
    return MemoryEstimate(
        parameters={name: sum(p.whole for p in sizes) for name, sizes in whole.items()},
        trained={name: sum(p.whole for p in sizes if p.trained) for name, sizes in whole.items()},
        stages=stages,
    )


def _stages(layout: MimoLayout) -> Iterator[tuple[str, int, range]]:
    """Yield name, stage and ranks. The ranks of a stage are consecutive, because pp is the slowest axis."""
    for name, sizes in layout.modules.items():
        size = sizes.size // sizes.pp
        for stage in range(sizes.pp):
            begin = sizes.ranks.start + stage * size
            yield name, stage, range(begin, begin + size)


def _representatives(layout: MimoLayout) -> list[int]:
    return sorted({rank for _, _, ranks in _stages(layout) for rank in (ranks[0], ranks[-1])})


def parameter_sizes(
    layout: MimoLayout, rank: int, configure: Configure, dtype_policy: DtypePolicy
) -> dict[str, dict[str, ParameterSize]]:
    """Module name -> global parameter name -> its size on one rank."""
    with as_rank(layout, rank) as infra:
        model = build_on_meta(configure, infra, dtype_policy)
        return {name: _sizes_of(model, infra, name) for name in infra.participating_modules}


def _sizes_of(model: RaggedMimoModel, infra: MimoModelInfra, name: str) -> dict[str, ParameterSize]:
    groups = infra.pg_collections[name]
    return {path: _size_of(parameter, groups) for path, parameter in named_parameters_of(model, infra, name)}


def _size_of(parameter: torch.nn.Parameter, groups: ProcessGroupCollection) -> ParameterSize:
    is_expert = not getattr(parameter, "allreduce", True)
    cut = shard_group(parameter, groups)
    shards = (cut.size() if cut else 1) * (groups.ep.size() if is_expert else 1)
    return ParameterSize(
        numel=parameter.numel(),
        itemsize=parameter.element_size(),
        whole=parameter.numel() * shards,
        trained=parameter.requires_grad,
        replicas=(groups.expt_dp if is_expert else groups.dp_cp).size(),
        is_expert=is_expert,
    )


def frozen_sizes(sizes: Mapping[str, ParameterSize], frozen: Sequence[str]) -> dict[str, ParameterSize]:
    """The sizes with what lies under the names in ``frozen`` marked as not trained."""
    return {
        path: replace(size, trained=size.trained and not any(lies_under(path, name) for name in frozen))
        for path, size in sizes.items()
    }


def _check_frozen(frozen: Sequence[str], paths: Sequence[str]) -> None:
    if missing := [name for name in frozen if not any(lies_under(path, name) for path in paths)]:
        raise ConfigError(
            f"frozen={missing}: no parameter lies under these names. Give the name of a module, or module.path with a "
            f"path from named_parameters() of that module."
        )


def _count(
    module: str,
    stage: int,
    ranks: range,
    sizes: Mapping[str, ParameterSize],
    dtype_policy: DtypePolicy,
    ddp: DistributedDataParallelConfig,
    *,
    training: bool,
) -> StageFootprint:
    size = dtype_policy.dtype.itemsize
    trained = [size for size in sizes.values() if size.trained] if training else []
    # Adam's moments have the dtype of the updated tensors: the parameters, or their float32 copies.
    state = 3 * 4 if dtype_policy.mixed else 2 * size
    kept = [math.ceil(size.numel * state / (size.replicas if ddp.use_distributed_optimizer else 1)) for size in trained]
    return StageFootprint(
        module=module,
        stage=stage,
        ranks=ranks,
        parameters=sum(size.numel for size in sizes.values()),
        weights=sum(size.numel * size.itemsize for size in sizes.values()),
        gradients=sum(size.numel for size in trained) * (4 if dtype_policy.mixed else size),
        optimizer=sum(kept),
    )


def _whole(module: str, first: Mapping[tuple[str, int], Mapping[str, ParameterSize]]) -> list[ParameterSize]:
    """Return every parameter of a module once.

    Only tied word embeddings may be on two pipeline stages; for any other parameter this is an error.
    """
    found: dict[str, ParameterSize] = {}
    for (name, stage), sizes in first.items():
        if name != module:
            continue
        both = sorted(path for path in sizes.keys() & found.keys() if not path.endswith("word_embeddings.weight"))
        if both:
            raise ConfigError(
                f"Module {module!r}: pipeline stage {stage} holds {both[0]!r}, which an earlier stage holds too, so it "
                f"is not divided into pipeline stages. Set pp=1, or let each stage build only its own layers."
            )
        found.update(sizes)
    return list(found.values())

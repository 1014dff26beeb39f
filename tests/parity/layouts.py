"""The same training through Trainer and MimoStrategy in some layout, compared with the oracle on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.loggers import Logger
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch.utils.data import DataLoader, Dataset

from lightning_mimo import MimoModelInfra, MimoModule, MimoPrecision, MimoStrategy, ModuleParallelism
from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.layers.attention import AttentionKind
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.initialization import cut_shard, global_named_parameters
from lightning_mimo.mimo.model import RaggedMimoModel, module_and_name
from lightning_mimo.models.sizes import Recompute
from lightning_mimo.parallel.random import seed_megatron
from tests.parity.model import CostlyPictures, ParityModule, PicturesSoundsAndText
from tests.parity.oracle import SEED, Task, Tensors, Truth

# What is smaller than this part of the global norm counts as this large: some gradients are zero but for rounding.
_FLOOR = 1e-8


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a task is laid out.

    Attributes:
        modules: sizes, every dp given.
        colocate: all modules on all ranks.
        num_microbatches: pipeline microbatches.
        ddp: fields of DistributedDataParallelConfig for all modules, or by module.
        sequence_parallel: of the language module.
        recompute: of both transformers.
        attention: of both transformers; the oracle's is the default.
    """

    modules: Mapping[str, ModuleParallelism]
    colocate: bool = False
    num_microbatches: int = 2
    ddp: Mapping[str, Any] = field(default_factory=dict)
    sequence_parallel: bool = False
    recompute: Recompute | None = None
    attention: AttentionKind = "sdpa"

    def modules_of(self, rank: int) -> tuple[str, ...]:
        """Names of the modules on a rank."""
        return MimoLayout.resolve(self.modules, world_size=self.ranks, colocate=self.colocate).modules_on(rank)

    @property
    def ranks(self) -> int:
        sizes = [sizes.size for sizes in self.modules.values()]
        return max(sizes) if self.colocate else sum(sizes)


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Largest relative differences from the oracle on one rank, and the parameters that were compared.

    A tensor's difference is taken relative to its own largest entry.
    """

    loss: float
    norm: float
    initial: float
    gradient: float
    weight: float
    worst: str
    parameters: frozenset[str]


@contextmanager
def open_world(layout: Layout) -> Iterator[MimoModelInfra]:
    """Grids of a layout, with megatron-core on the CPU while this is open. Collective over the world."""
    resolved = MimoLayout.resolve(layout.modules, world_size=layout.ranks, colocate=layout.colocate)
    with megatron_on_cpu():
        seed_megatron(resolved, dist.get_rank(), seed=SEED)
        infra = MimoModelInfra.build(resolved)
        yield infra
        # Only after success: a rank that raised must not wait for the others.
        infra.destroy()


class PoolEnvironment(LightningEnvironment):
    """Ranks of the pool, whose process group exists already."""

    creates_processes_externally = True

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def local_rank(self) -> int:
        return dist.get_rank()

    def set_world_size(self, size: int) -> None:
        assert size == dist.get_world_size()

    def set_global_rank(self, rank: int) -> None:
        assert rank == dist.get_rank()

    def teardown(self) -> None:
        pass


class Recorder(pl.Callback):
    """Keeps initial weights, every batch's loss, and gradients and norms of every optimizer step,
    and what was last said of the modules."""

    def __init__(self) -> None:
        self.initial: Tensors = {}
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.gradients: list[Tensors] = []
        self.telemetry: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: ParityModule) -> None:
        self.initial = weights(pl_module.model, trainer.strategy.infra)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: ParityModule, optimizer: Any) -> None:
        self.gradients.append(gradients(pl_module.model, trainer.strategy.infra))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        if (outcome := trainer.optimizers[0].outcome) is not None:
            self.norms.append(outcome.grad_norm)
        for name, value in trainer.callback_metrics.items():
            if name.startswith("telemetry/"):
                self.telemetry[name] = float(value)


def train(
    task: Task,
    layout: Layout,
    *,
    module: MimoModule | None = None,
    dataset: Dataset | None = None,
    validation: Dataset | None = None,
    callbacks: Sequence[pl.Callback] = (),
    strategy_options: Mapping[str, Any] | None = None,
    logger: Logger | bool = False,
    ckpt_path: str | None = None,
    **trainer_options: Any,
) -> tuple[Recorder, MimoModule, MimoStrategy]:
    """Run a task in a layout on the ranks of the pool. Collective over the world.

    Args:
        task: what is trained.
        layout: on which ranks.
        module: in the place of a plain ParityModule.
        dataset: in the place of the task's samples.
        validation: what is validated on, if anything.
        callbacks: of the Trainer, before the recorder.
        strategy_options: further arguments of MimoStrategy.
        logger: of the Trainer.
        ckpt_path: to go on from.
        trainer_options: further arguments of the Trainer.
    """
    torch.manual_seed(SEED)
    strategy = MimoStrategy(
        dict(layout.modules),
        task.batch,
        layout.num_microbatches,
        colocate=layout.colocate,
        ddp=ddp_config(layout),
        # Not the Trainer's argument, because Lightning takes 16-mixed for bf16-mixed on a CPU.
        precision_plugin=MimoPrecision(task.precision),
        cluster_environment=PoolEnvironment(),
        **{"pack_to": task.pack_to, **(strategy_options or {})},
    )
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        accumulate_grad_batches=task.accumulate,
        max_steps=task.steps,
        callbacks=[*callbacks, recorder],
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **trainer_options},
    )
    module = module or ParityModule(
        task.model,
        sequence_parallel=layout.sequence_parallel,
        recompute=layout.recompute,
        attention=layout.attention,
    )
    kind = CostlyPictures if task.samples.costly else PicturesSoundsAndText
    loader = DataLoader(dataset or kind(task.samples), batch_size=task.batch)
    held_out = None if validation is None else DataLoader(validation, batch_size=task.batch)
    trainer.fit(module, loader, held_out, ckpt_path=ckpt_path)
    return recorder, module, strategy


def ddp_config(layout: Layout) -> DistributedDataParallelConfig | dict[str, DistributedDataParallelConfig]:
    """What MimoStrategy is given."""
    if layout.ddp.keys() & layout.modules.keys():
        return {name: DistributedDataParallelConfig(**fields) for name, fields in layout.ddp.items()}
    return DistributedDataParallelConfig(**layout.ddp)


def errors(
    task: Task,
    layout: Layout,
    expected: Truth,
    *,
    module: MimoModule | None = None,
    dataset: Dataset | None = None,
) -> Errors:
    """Run a task in a layout and compare this rank's part of everything. Collective over the world.

    Args:
        task: what is trained.
        layout: on which ranks.
        expected: what it must come to.
        module: as for :func:`train`.
        dataset: as for :func:`train`.
    """
    recorder, module, strategy = train(task, layout, module=module, dataset=dataset)
    infra = strategy.infra
    final = weights(module.model, infra)
    shards = {name: (parameter, groups) for name, parameter, groups in parameters(module.model, infra)}

    def compare(found: Tensors, whole: Tensors, floor: float) -> dict[str, float]:
        return {
            name: _relative(tensor, cut_shard(whole[name], *shards[name]), max(floor, float(whole[name].abs().max())))
            for name, tensor in found.items()
        }

    assert len(recorder.losses) == len(expected.losses)
    assert len(recorder.gradients) == len(recorder.norms) == len(expected.norms)
    by_step = [
        compare(found, whole, _FLOOR * norm)
        for found, whole, norm in zip(recorder.gradients, expected.gradients, expected.norms, strict=True)
    ]
    gradient = {name: max(step[name] for step in by_step) for name in by_step[0]}
    result = Errors(
        loss=max(_number(a, b) for a, b in zip(recorder.losses, expected.losses, strict=True)),
        norm=max(_number(a, b) for a, b in zip(recorder.norms, expected.norms, strict=True)),
        initial=max(compare(recorder.initial, expected.initial, 0.0).values()),
        gradient=max(gradient.values(), default=0.0),
        weight=max(compare(final, expected.final, 0.0).values()),
        worst=max(gradient, key=gradient.__getitem__, default="none is trained here"),
        parameters=frozenset(final),
    )
    infra.destroy()
    return result


@dataclass(frozen=True, kw_only=True)
class Distances:
    """How far this rank's part of a run is from the truth, in a precision that rounds.

    Attributes:
        gradient: module -> distance of the first step's gradients, as one vector, relative to its length.
        losses: relative differences, batch for batch.
    """

    gradient: Mapping[str, float]
    losses: list[float]


def distances(task: Task, layout: Layout, exact: Truth) -> Distances:
    """Run a task in a layout and compare this rank's part with the truth. Collective over the world."""
    recorder, module, strategy = train(task, layout)
    infra = strategy.infra
    found = recorder.gradients[0]
    whole = {name: cut_shard(exact.gradients[0][name], p, g) for name, p, g in parameters(module.model, infra)}
    result = Distances(
        gradient=distance_by_module(found, whole),
        losses=[_number(a, b) for a, b in zip(recorder.losses, exact.losses, strict=True)],
    )
    infra.destroy()
    return result


def distance_by_module(found: Tensors, exact: Tensors) -> dict[str, float]:
    """Module -> distance of its tensors, as one vector, relative to its length."""
    sums: dict[str, list[float]] = {}
    for name, tensor in exact.items():
        module = name.removeprefix("modality_submodules.").partition(".")[0]
        difference, length = sums.setdefault(module, [0.0, 0.0])
        difference += float((found[name].double() - tensor.double()).square().sum())
        sums[module] = [difference, length + float(tensor.double().square().sum())]
    return {module: math.sqrt(difference / length) for module, (difference, length) in sums.items()}


def parameters(model: RaggedMimoModel, infra: MimoModelInfra) -> Iterator[tuple[str, torch.nn.Parameter, Any]]:
    """Global name, parameter and process groups of everything on this rank."""
    for name in infra.participating_modules:
        module, prefix = module_and_name(model, name)
        inner = module.module if isinstance(module, DistributedDataParallel) else module
        groups = infra.pg_collections[name]
        for parameter_name, parameter in global_named_parameters(inner, prefix=prefix, groups=groups):
            yield parameter_name, parameter, groups


def weights(model: RaggedMimoModel, infra: MimoModelInfra) -> Tensors:
    return {name: parameter.detach().clone() for name, parameter, _ in parameters(model, infra)}


def gradients(model: RaggedMimoModel, infra: MimoModelInfra) -> Tensors:
    """Reduced gradients of what is trained. Collective over a module's replicas for the distributed optimizer."""
    for name in infra.participating_modules:
        module, _ = module_and_name(model, name)
        if module.ddp_config.use_distributed_optimizer:
            _complete(module)
    return {
        name: parameter.main_grad.detach().clone()
        for name, parameter, _ in parameters(model, infra)
        if parameter.requires_grad
    }


def _complete(module: DistributedDataParallel) -> None:
    """Give every replica the parts of the reduced gradients that the others hold; none of them reads these again."""
    for group in module.bucket_groups + module.expert_parallel_bucket_groups:
        members = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            mine = bucket.grad_data.chunk(members.size())[members.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, mine, group=members)


def _relative(found: torch.Tensor, expected: torch.Tensor, scale: float) -> float:
    assert found.shape == expected.shape
    difference = float((found.double() - expected.double()).abs().max()) if found.numel() else 0.0
    assert difference == difference, "a difference is not a number"
    return difference / scale if scale else difference


def _number(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected) if expected else abs(found)

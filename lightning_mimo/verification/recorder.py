"""Records what two runs are compared by: initial weights, losses, reduced gradients, final weights of a rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, override

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from lightning_mimo.mimo.model import RaggedMimoModel, module_and_name
from lightning_mimo.mimo.parameter_names import named_parameters_of
from lightning_mimo.parallel.infra import MimoModelInfra

Tensors = dict[str, torch.Tensor]
"""Global name of a parameter -> this rank's shard."""


@dataclass(kw_only=True)
class Recording:
    """A run, seen from one rank.

    Attributes:
        initial: weights before the first step.
        losses: of every step, over the global batch.
        gradients: of every step, reduced and scaled, before clipping.
        final: weights after the last step.
    """

    initial: Tensors = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    gradients: list[Tensors] = field(default_factory=list)
    final: Tensors = field(default_factory=dict)


class Recorder(pl.Callback):
    """Fills a Recording."""

    def __init__(self) -> None:
        self.recording = Recording()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.recording.initial = weights_of(pl_module.mimo_model, pl_module.infra)

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.recording.gradients.append(gradients_of(pl_module.mimo_model, pl_module.infra))

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.recording.losses.append(float(trainer.callback_metrics["train/loss"]))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.recording.final = weights_of(pl_module.mimo_model, pl_module.infra)


def parameters_of(model: RaggedMimoModel, infra: MimoModelInfra) -> Iterator[tuple[str, torch.nn.Parameter, Any]]:
    """Global name, parameter and process groups of everything on this rank."""
    for module in infra.participating_modules:
        for name, parameter in named_parameters_of(model, infra, module):
            yield name, parameter, infra.pg_collections[module]


def weights_of(model: RaggedMimoModel, infra: MimoModelInfra) -> Tensors:
    """Copies of this rank's weights."""
    return {name: parameter.detach().clone() for name, parameter, _ in parameters_of(model, infra)}


def gradients_of(model: RaggedMimoModel, infra: MimoModelInfra) -> Tensors:
    """Copies of reduced gradients. Collective over a module's replicas with the distributed optimizer."""
    for name in infra.participating_modules:
        module, _ = module_and_name(model, name)
        if isinstance(module, DistributedDataParallel) and module.ddp_config.use_distributed_optimizer:
            _gather_gradients(module)
    return {
        name: parameter.main_grad.detach().clone()  # type: ignore[attr-defined]  # Megatron's DDP sets it
        for name, parameter, _ in parameters_of(model, infra)
        if parameter.requires_grad
    }


def _gather_gradients(module: DistributedDataParallel) -> None:
    """Give every replica the shards of the reduced gradients that others hold; none of them reads these again."""
    for group in module.bucket_groups + module.expert_parallel_bucket_groups:
        members = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            own = bucket.grad_data.chunk(members.size())[members.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=members)

"""Data parallelism of each module: gradient reduction and the all-gather of updated weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.mimo import MimoModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config

from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.mimo.dtypes import FLOAT32, DtypePolicy
from lightning_mimo.mimo.model import RaggedMimoModel, module_and_name
from lightning_mimo.parallel.infra import MimoModelInfra


def options_by_module(
    ddp: DistributedDataParallelConfig | Mapping[str, DistributedDataParallelConfig] | None, modules: Collection[str]
) -> dict[str, DistributedDataParallelConfig]:
    """Expand the user's DDP settings to one entry per module.

    Args:
        ddp: settings for all modules, or a mapping by module name; omitted modules use the defaults.
        modules: module names of the layout.

    Raises:
        ConfigError: if a name is not a module of the layout.
    """
    if not isinstance(ddp, Mapping):
        return dict.fromkeys(modules, ddp or DistributedDataParallelConfig())
    if unknown := sorted(set(ddp) - set(modules)):
        raise ConfigError(
            f"MimoStrategy(ddp=...): there is no module {unknown[0]!r}; the layout has "
            f"{', '.join(map(repr, modules))}. Use these names, or pass one DistributedDataParallelConfig for all."
        )
    return {name: ddp.get(name, DistributedDataParallelConfig()) for name in modules}


def check_options(ddp: Mapping[str, DistributedDataParallelConfig], dtype_policy: DtypePolicy) -> None:
    """Reject unsupported or incompatible settings before any process group exists.

    Args:
        ddp: module name -> the user's settings.
        dtype_policy: the dtypes of the run.

    Raises:
        ConfigError: naming the module, the settings and the remedy.
    """
    for name, options in ddp.items():
        if problem := _problem_with(options, dtype_policy):
            raise ConfigError(f"MimoStrategy(ddp=...), module {name!r}: {problem}")


def _problem_with(ddp: DistributedDataParallelConfig, dtype_policy: DtypePolicy) -> str | None:
    if ddp.overlap_param_gather and not ddp.use_distributed_optimizer:
        return (
            "overlap_param_gather=True defers the all-gather of weights, which only the distributed optimizer does. "
            "Set use_distributed_optimizer=True as well, or omit overlap_param_gather."
        )
    if ddp.overlap_param_gather and not ddp.overlap_grad_reduce:
        return "overlap_param_gather=True needs overlap_grad_reduce=True. Set both, or neither."
    if ddp.use_distributed_optimizer and not dtype_policy.mixed and dtype_policy.dtype != torch.float32:
        precision, instead = {
            torch.float64: ("64-true", "Omit one of them."),
            torch.bfloat16: ("bf16-true", "Use precision='bf16-mixed', or omit use_distributed_optimizer."),
        }[dtype_policy.dtype]
        return (
            f"use_distributed_optimizer=True does not work with Trainer(precision={precision!r}), because "
            f"megatron-core's distributed optimizer keeps and updates float32 parameters. {instead}"
        )
    if ddp.average_in_collective:
        return (
            "average_in_collective=True is incompatible with a loss per token: gradients are summed, then divided by "
            "the number of loss tokens in the global batch. Omit it."
        )
    if ddp.num_distributed_optimizer_instances > 1:
        return (
            f"num_distributed_optimizer_instances={ddp.num_distributed_optimizer_instances} is not supported by "
            f"megatron-core's MimoOptimizer. Set it to 1."
        )
    if ddp.use_megatron_fsdp or ddp.use_custom_fsdp:
        return (
            "use_megatron_fsdp=True is not supported. To shard the optimizer state over the replicas, set "
            "use_distributed_optimizer=True."
        )
    return None


class FixedOrderDistributedDataParallel(DistributedDataParallel):
    """Megatron's DistributedDataParallel whose ``overlap_grad_reduce`` supports parameters without a gradient.

    Upstream reduces a bucket as soon as each of its gradients has been accumulated as often as in the first batch. The
    order of the buckets is not fixed, and a bucket that does not become complete fails an assertion. A replica whose
    samples have no images would fail, or reduce its buckets in a different order from its peers. This class reduces
    buckets in a fixed order, as torch's DDP does, and reduces the incomplete ones at the end of the batch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # How often each parameter's gradient was accumulated in the first batch; set after that batch.
        self._expected: dict[torch.nn.Parameter, int] | None = None
        self._started = [0, 0]

    @property
    def _chains(self) -> tuple[list[Any], list[Any]]:
        """Bucket groups in reduction order: those of dense parameters, and those of experts, which have other peers."""
        return self.bucket_groups, self.expert_parallel_bucket_groups

    def zero_grad_buffer(self) -> None:
        """Zero the gradient buffers and begin a new batch."""
        groups = [group for chain in self._chains for group in chain]
        arrived = {p: n for group in groups for p, n in group.per_param_grad_ready_counts.items()}
        if self._expected is None and arrived:
            self._expected = arrived
        self._started = [0, 0]
        for group in groups:
            # With empty counts, upstream treats every batch as the first one, in which it only counts.
            group.per_param_grad_ready_counts = {}
        super().zero_grad_buffer()

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Start the reduction of the incomplete buckets, then wait for all buckets."""
        if self.ddp_config.overlap_grad_reduce:
            for i, chain in enumerate(self._chains):
                for group in chain[self._started[i] :]:
                    group.start_grad_sync(force_all_reduce=force_all_reduce)
                self._started[i] = len(chain)
        super().finish_grad_sync(force_all_reduce=force_all_reduce)

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        accumulate = super()._make_backward_post_hook(param)

        def hook(*unused: Any) -> None:
            accumulate(*unused)
            if self.ddp_config.overlap_grad_reduce and self.param_to_bucket_group[param].is_last_microbatch:
                self._start_complete(param)

        return hook

    def _start_complete(self, param: torch.nn.Parameter) -> None:
        group = self.param_to_bucket_group[param]
        i = 0 if group in self.bucket_groups else 1
        chain = self._chains[i]
        if chain.index(group) < self._started[i]:
            names = {id(p): name for name, p in self.module.named_parameters()}
            raise ConfigError(
                f"The gradient of {names[id(param)]!r} changed after it had been reduced: this batch used the "
                f"parameter more often than the first batch did. Omit overlap_grad_reduce in MimoStrategy(ddp=...)."
            )
        while self._started[i] < len(chain) and self._is_complete(chain[self._started[i]]):
            chain[self._started[i]].start_grad_sync(force_all_reduce=self.force_all_reduce)
            self._started[i] += 1

    def _is_complete(self, group: Any) -> bool:
        if self._expected is None:
            return False
        counts = group.per_param_grad_ready_counts
        return all(counts.get(p, 0) >= self._expected.get(p, 1) for p in group.params)


def wrap_with_ddp(
    model: RaggedMimoModel,
    infra: MimoModelInfra,
    ddp: Mapping[str, DistributedDataParallelConfig],
    dtype_policy: DtypePolicy = FLOAT32,
) -> None:
    """Wrap each of this rank's modules in place in Megatron's DistributedDataParallel, over the module's own groups.

    Modules that are already wrapped are not changed.

    Args:
        model: the model, in the dtypes of the run.
        infra: process groups.
        ddp: module name -> settings. ``grad_reduce_in_fp32`` is taken from ``dtype_policy``.
        dtype_policy: the dtypes of the run.
    """
    for name in infra.participating_modules:
        module, _ = module_and_name(model, name)
        if isinstance(module, DistributedDataParallel):
            continue
        wrapped = FixedOrderDistributedDataParallel(
            get_model_config(module) if name == LANGUAGE else _encoder_config(model, name),
            # A copy, because each wrapper sets its own bucket size in it. Only begin_gathering gathers weights: hooks
            # that gather on demand would not all be called if a sample has no images.
            replace(ddp[name], align_param_gather=True, grad_reduce_in_fp32=dtype_policy.mixed),
            module,
            pg_collection=infra.pg_collections[name],
        )
        if name == LANGUAGE:
            model.language_model = wrapped
        else:
            model.modality_submodules[name] = wrapped


def begin_gathering(model: RaggedMimoModel) -> None:
    """Start the all-gather of updated weights for modules with ``overlap_param_gather``, which defers it.

    Layers wait for their weights when they are called. Collective over the replicas of each module; call it after every
    optimizer step and once before the first.
    """
    for ddp in _gathering_modules(model):
        ddp.start_param_sync()


def complete_gathering(model: RaggedMimoModel) -> None:
    """Wait for all weights, including those of layers that were not called.

    Call it before weights are read, saved or updated.
    """
    for ddp in _gathering_modules(model):
        for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
            if group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)


def _gathering_modules(model: RaggedMimoModel) -> list[DistributedDataParallel]:
    modules = [model.language_model, *model.modality_submodules.values()]
    wrapped = [module for module in modules if isinstance(module, DistributedDataParallel)]
    return [ddp for ddp in wrapped if ddp.ddp_config.overlap_param_gather]


def _encoder_config(model: MimoModel, name: str) -> TransformerConfig:
    """Return the config for reducing an encoder's gradients: that of a transformer inside it, or a minimal one."""
    configs = (getattr(part, "config", None) for part in model.modality_submodules[name].modules())
    found = next((config for config in configs if isinstance(config, TransformerConfig)), None)
    if found is None:
        found = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1)
    # Every module must sum its gradients, as the language module does; otherwise the encoder's would be scaled wrongly.
    found.calculate_per_token_loss = True
    return found

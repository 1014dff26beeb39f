"""The data parallelism of each module: how its gradients are reduced and its updated weights exchanged."""

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
    """What a user set for all modules at once, or for some of them by name, for each module.

    Args:
        ddp: one for all modules; or by module name, those that are left out taking the defaults.
        modules: names of the layout.

    Raises:
        ConfigError: for a name that is no module.
    """
    if not isinstance(ddp, Mapping):
        return dict.fromkeys(modules, ddp or DistributedDataParallelConfig())
    if unknown := sorted(set(ddp) - set(modules)):
        raise ConfigError(
            f"MimoStrategy(ddp=...): there is no module {unknown[0]!r}; the layout has "
            f"{', '.join(map(repr, modules))}. Name modules, or give one DistributedDataParallelConfig for all."
        )
    return {name: ddp.get(name, DistributedDataParallelConfig()) for name in modules}


def check_options(ddp: Mapping[str, DistributedDataParallelConfig], dtype_policy: DtypePolicy) -> None:
    """Refuse settings that do not go together, before any process group exists.

    Args:
        ddp: module name -> what the user set.
        dtype_policy: the dtypes of the run.

    Raises:
        ConfigError: naming the module, the two settings and what to do.
    """
    for name, options in ddp.items():
        if problem := _problem_with(options, dtype_policy):
            raise ConfigError(f"MimoStrategy(ddp=...), module {name!r}: {problem}")


def _problem_with(ddp: DistributedDataParallelConfig, dtype_policy: DtypePolicy) -> str | None:
    if ddp.overlap_param_gather and not ddp.use_distributed_optimizer:
        return (
            "overlap_param_gather=True puts off an exchange of weights that only the distributed optimizer makes. Set "
            "use_distributed_optimizer=True too, or leave it out."
        )
    if ddp.overlap_param_gather and not ddp.overlap_grad_reduce:
        return "overlap_param_gather=True needs overlap_grad_reduce=True. Set both, or neither."
    if ddp.use_distributed_optimizer and not dtype_policy.mixed and dtype_policy.dtype != torch.float32:
        precision, instead = {
            torch.float64: ("64-true", "Leave one of them out."),
            torch.bfloat16: ("bf16-true", "Take precision='bf16-mixed', or leave it out."),
        }[dtype_policy.dtype]
        return (
            f"use_distributed_optimizer=True does not work with Trainer(precision={precision!r}), because "
            f"megatron-core's distributed optimizer keeps and updates float32 parameters. {instead}"
        )
    if ddp.average_in_collective:
        return (
            "average_in_collective=True does not go with a loss per token: gradients are summed, then divided by the "
            "tokens of the global batch. Leave it out."
        )
    if ddp.num_distributed_optimizer_instances > 1:
        return (
            f"num_distributed_optimizer_instances={ddp.num_distributed_optimizer_instances} is not supported by "
            f"megatron-core's MimoOptimizer. Set it to 1."
        )
    if ddp.use_megatron_fsdp or ddp.use_custom_fsdp:
        return (
            "use_megatron_fsdp=True is not supported; use_distributed_optimizer=True divides the optimizer's state "
            "over the replicas."
        )
    return None


class FixedOrderDistributedDataParallel(DistributedDataParallel):
    """Megatron's DistributedDataParallel, whose ``overlap_grad_reduce`` allows parameters without a gradient.

    Upstream reduces a bucket as soon as its gradients have arrived as often as in the first batch, in whatever order
    the buckets get there, and fails an assertion if they do not. A replica whose samples have no images would stop, or
    reduce its buckets in another order than its peers. Here buckets go in one fixed order, as in torch's own DDP, and
    those that are not complete by the end of the batch go then.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # How often each parameter's gradient arrived in the first batch, once that is over.
        self._expected: dict[torch.nn.Parameter, int] | None = None
        self._started = [0, 0]

    @property
    def _chains(self) -> tuple[list[Any], list[Any]]:
        """Bucket groups in the order of reduction: of dense parameters, and of experts, which have their own peers."""
        return self.bucket_groups, self.expert_parallel_bucket_groups

    def zero_grad_buffer(self) -> None:
        """As upstream's; a new batch begins."""
        groups = [group for chain in self._chains for group in chain]
        arrived = {p: n for group in groups for p, n in group.per_param_grad_ready_counts.items()}
        if self._expected is None and arrived:
            self._expected = arrived
        self._started = [0, 0]
        for group in groups:
            # So upstream goes on as in a first batch, where it counts only.
            group.per_param_grad_ready_counts = {}
        super().zero_grad_buffer()

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """As upstream's, after the buckets that were not complete have been started too."""
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
                f"parameter more often than the first one did. Leave overlap_grad_reduce out of MimoStrategy(ddp=...)."
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
    """Wrap each of this rank's modules in Megatron's DistributedDataParallel, over its own groups, in place.

    What is wrapped already is left as it is.

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
            # A copy, because each wrapper writes its own bucket size into it. Weights are gathered by begin_gathering
            # only; hooks that gather on demand would not all be called where a sample has no images.
            replace(ddp[name], align_param_gather=True, grad_reduce_in_fp32=dtype_policy.mixed),
            module,
            pg_collection=infra.pg_collections[name],
        )
        if name == LANGUAGE:
            model.language_model = wrapped
        else:
            model.modality_submodules[name] = wrapped


def begin_gathering(model: RaggedMimoModel) -> None:
    """Start to exchange the weights that each replica has updated, where ``overlap_param_gather`` puts it off.

    Layers wait for their weights when they are called. Collective over the replicas of each module; to be called after
    every optimizer step, and once before the first.
    """
    for ddp in _gathering_modules(model):
        ddp.start_param_sync()


def complete_gathering(model: RaggedMimoModel) -> None:
    """Wait for all weights, also those of layers that were not called. Before weights are read, saved or updated."""
    for ddp in _gathering_modules(model):
        for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
            if group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)


def _gathering_modules(model: RaggedMimoModel) -> list[DistributedDataParallel]:
    modules = [model.language_model, *model.modality_submodules.values()]
    wrapped = [module for module in modules if isinstance(module, DistributedDataParallel)]
    return [ddp for ddp in wrapped if ddp.ddp_config.overlap_param_gather]


def _encoder_config(model: MimoModel, name: str) -> TransformerConfig:
    """Config under which an encoder's gradients are reduced: that of a transformer inside, or a plain one."""
    configs = (getattr(part, "config", None) for part in model.modality_submodules[name].modules())
    found = next((config for config in configs if isinstance(config, TransformerConfig)), None)
    if found is None:
        found = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1)
    # Every module must sum its gradients, as the language module does: a mix would scale the encoder's wrongly.
    found.calculate_per_token_loss = True
    return found

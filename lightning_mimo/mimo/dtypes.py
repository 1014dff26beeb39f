"""Which dtypes a run stores, computes and reduces with: what a precision means to megatron-core."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class DtypePolicy:
    """The dtypes of a run, the same for all modules.

    Attributes:
        dtype: of parameters, activations and what goes over the bridges.
        mixed: whether gradients are accumulated and reduced in float32 and the optimizer updates float32 copies of the
            parameters (Megatron's main parameters). Otherwise all of that has ``dtype``, too.
    """

    dtype: torch.dtype = torch.float32
    mixed: bool = False

    @property
    def needs_loss_scale(self) -> bool:
        """Whether gradients would be lost below the smallest number of the dtype."""
        return self.dtype == torch.float16

    def apply_to(self, config: TransformerConfig) -> None:
        """Set the dtypes of one transformer's config. Before it is built, since attention reads them only then."""
        config.params_dtype = config.pipeline_dtype = config.autocast_dtype = self.dtype
        config.bf16 = self.dtype == torch.bfloat16
        config.fp16 = self.dtype == torch.float16
        if config.num_moe_experts and self.dtype == torch.float64:
            config.moe_router_dtype = "fp64"

    def convert[M: torch.nn.Module](self, module: M) -> M:
        """Convert parameters and buffers in place, and the configs of transformers that a user's code has built."""
        configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
        for config in configs.values():
            if isinstance(config, TransformerConfig):
                self.apply_to(config)
        # What a user keeps in a shorter dtype on purpose, such as a frozen encoder, stays so under float32.
        return module if self.dtype == torch.float32 else module.to(self.dtype)

    def optimizer_config(self, config: OptimizerConfig) -> OptimizerConfig:
        """A copy of a user's config, with the dtypes filled in."""
        config = copy.copy(config)
        config.params_dtype = self.dtype
        config.bf16 = self.mixed and self.dtype == torch.bfloat16
        config.fp16 = self.mixed and self.dtype == torch.float16
        return config


FLOAT32 = DtypePolicy()


def transformer_configs(config: MimoModelConfig) -> Iterator[TransformerConfig]:
    """All configs that stand in the specs of a model, each as often as it does."""
    yield from _configs_in([config.language_model_spec, *config.modality_submodules_spec.values()])


def _configs_in(value: Any) -> Iterator[TransformerConfig]:
    if isinstance(value, TransformerConfig):
        yield value
    elif isinstance(value, ModuleSpec):
        yield from _configs_in([value.params, value.submodules])
    elif isinstance(value, dict):
        yield from _configs_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _configs_in(each)

"""Dtypes in which a run stores, computes and reduces, and how they are set in megatron-core's configs."""

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

_FREQUENCIES = ("inv_freq", "original_inv_freq")


@dataclass(frozen=True, kw_only=True)
class DtypePolicy:
    """Dtypes of a run, the same for all modules.

    Attributes:
        dtype: dtype of parameters, activations and tensors sent over the bridges.
        mixed: whether gradients are accumulated and reduced in float32, and the optimizer updates float32 copies of the
            parameters (Megatron's main parameters). Otherwise these have ``dtype``, too.
    """

    dtype: torch.dtype = torch.float32
    mixed: bool = False

    @property
    def needs_loss_scale(self) -> bool:
        """Whether small gradients would underflow in this dtype without a loss scale."""
        return self.dtype == torch.float16

    def apply_to(self, config: TransformerConfig) -> None:
        """Set the dtypes in a transformer's config. Call before it is built, as attention reads them only then."""
        config.params_dtype = config.pipeline_dtype = config.autocast_dtype = self.dtype
        config.bf16 = self.dtype == torch.bfloat16
        config.fp16 = self.dtype == torch.float16
        if config.num_moe_experts and self.dtype == torch.float64:
            config.moe_router_dtype = "fp64"

    def convert[M: torch.nn.Module](self, module: M) -> M:
        """Convert parameters and buffers in place, and the configs of transformers that were built by user code.

        Rotary frequencies of transformers (non-persistent buffers ``inv_freq``) are not rounded to 16 bits, as they are
        not by ``from_pretrained(dtype=...)``: positions that are far from 0 would be turned by another angle.
        """
        configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
        for config in configs.values():
            if isinstance(config, TransformerConfig):
                self.apply_to(config)
        # With float32, modules that a user keeps in a shorter dtype on purpose, such as a frozen encoder, are kept.
        if self.dtype == torch.float32:
            return module
        frequencies = list(_rotary_frequencies(module)) if self.dtype.itemsize < 4 else []
        module.to(self.dtype)
        for part, name, exact in frequencies:
            setattr(part, name, exact)
        return module

    def optimizer_config(self, config: OptimizerConfig) -> OptimizerConfig:
        """Return a copy of a user's config with the dtypes of this policy."""
        config = copy.copy(config)
        config.params_dtype = self.dtype
        config.bf16 = self.mixed and self.dtype == torch.bfloat16
        config.fp16 = self.mixed and self.dtype == torch.float16
        return config


FLOAT32 = DtypePolicy()


def _rotary_frequencies(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.Tensor]]:
    """Module, name and tensor of the buffers in which transformers holds rotary frequencies."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name in _FREQUENCIES and name in part._non_persistent_buffers_set:
                yield part, name, buffer


def transformer_configs(config: MimoModelConfig) -> Iterator[TransformerConfig]:
    """All TransformerConfigs in the specs of a model. A config that is used several times is yielded as often."""
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

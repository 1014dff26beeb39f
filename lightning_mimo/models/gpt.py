"""Layers of a GPT from megatron-core's own modules, for every machine and with sequence parallelism."""

from __future__ import annotations

import copy

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.torch_norm import LayerNormInterface, WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig


class SequenceParallelTorchNorm(WrappedTorchNorm):
    """torch's norm on a part of the sequence; upstream refuses it there.

    Its weights are marked, so that their gradients are added up over the tensor-parallel ranks.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> LayerNormInterface:
        whole = copy.copy(config)
        whole.sequence_parallel = False
        norm = super().__new__(cls, whole, hidden_size, eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def gpt_block(config: TransformerConfig, *, pp_rank: int) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, dense or with experts as the config says.

    Args:
        config: of the language module.
        pp_rank: the stage.
    """
    layer = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization=config.normalization)
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        setattr(layer.submodules, name, _for_sequence_parallel(getattr(layer.submodules, name)))
    # Apex has no RMS norm.
    last = LayerNormImpl if config.normalization == "LayerNorm" else layer.submodules.input_layernorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, pp_rank=pp_rank),
        layer_norm=_for_sequence_parallel(last),
    )


def _for_sequence_parallel(norm: type) -> type:
    """Apex's and Transformer Engine's norms, where they are installed, can do it by themselves."""
    return SequenceParallelTorchNorm if norm is WrappedTorchNorm else norm

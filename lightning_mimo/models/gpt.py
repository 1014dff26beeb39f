"""ModuleSpec of a GPT from megatron-core's modules, for CPUs and GPUs, with sequence parallelism."""

from __future__ import annotations

import copy

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormInterface, WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo.layers.attention import AttentionKind, SdpaAttention
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.models.sizes import TransformerSize, check_divides, transformer_config
from lightning_mimo.parallel.infra import MimoModelInfra

__all__ = ["TransformerSize", "gpt_spec"]


class SequenceParallelTorchNorm(WrappedTorchNorm):
    """torch's norm with sequence parallelism, which upstream's WrappedTorchNorm does not support.

    Its weights are marked so that their gradients are summed over the tensor-parallel ranks.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> LayerNormInterface:
        whole = copy.copy(config)
        whole.sequence_parallel = False
        norm = super().__new__(cls, whole, hidden_size, eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def gpt_spec(
    infra: MimoModelInfra,
    size: TransformerSize,
    *,
    vocab_size: int,
    max_sequence_length: int,
    tie_embeddings: bool = False,
    sequence_parallel: bool = False,
) -> ModuleSpec:
    """ModuleSpec of a GPT with rotary positions, for ``MimoModelConfig(language_model_spec=...)``.

    Args:
        infra: grids and process groups of this rank.
        size: dimensions of the GPT. Encoder outputs must have its ``hidden_size``.
        vocab_size: number of token ids, including placeholders; the language module's tp must divide it.
        max_sequence_length: longest sequence in tokens.
        tie_embeddings: share the weights of the word embeddings with the output layer.
        sequence_parallel: divide the sequence over the tensor-parallel ranks between attention and MLP. It has no
            effect if tp=1, and is required for a mixture of experts if tp > 1.

    Raises:
        LayoutError: if heads, layers, experts or the vocabulary do not divide over the layout.
    """
    tp = infra.layout.modules[LANGUAGE].tp
    config = transformer_config(infra.layout, LANGUAGE, size, sequence_parallel=sequence_parallel and tp > 1)
    check_divides("vocab_size", vocab_size, LANGUAGE, "tp", tp)
    groups = infra.pg_collections.get(LANGUAGE)
    return ModuleSpec(
        module=GPTModel,
        params={
            "config": config,
            "transformer_layer_spec": _gpt_block(config, size.attention, pp_rank=groups.pp.rank() if groups else 0),
            "vocab_size": vocab_size,
            "max_sequence_length": max_sequence_length,
            "position_embedding_type": "rope",
            "share_embeddings_and_output_weights": tie_embeddings,
            # MimoModel divides the sequence itself, after text and images are combined.
            "scatter_embedding_sequence_parallel": False,
            "pre_process": groups is None or groups.pp.rank() == 0,
            "post_process": groups is None or groups.pp.rank() == groups.pp.size() - 1,
            "pg_collection": groups,
        },
    )


def _gpt_block(config: TransformerConfig, attention: AttentionKind, *, pp_rank: int) -> TransformerBlockSubmodules:
    """Specs of the layers of one pipeline stage, dense or with experts depending on the config.

    Args:
        config: config of the language module.
        attention: attention implementation, a value of ``TransformerSize.attention``.
        pp_rank: index of the stage.
    """
    layer = _gpt_layer(config, attention)
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        setattr(layer.submodules, name, _for_sequence_parallel(getattr(layer.submodules, name)))
    # Apex has no RMS norm; in Transformer Engine's layers it is part of the next linear layer.
    own = config.normalization == "LayerNorm" or attention == "te"
    last = LayerNormImpl if own else layer.submodules.input_layernorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, pp_rank=pp_rank),
        layer_norm=_for_sequence_parallel(last),
    )


def _gpt_layer(config: TransformerConfig, attention: AttentionKind) -> ModuleSpec:
    if attention == "te":
        return get_gpt_layer_with_transformer_engine_spec(num_experts=config.num_moe_experts)
    layer = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization=config.normalization)
    if attention == "sdpa":
        layer.submodules.self_attention.submodules.core_attention = SdpaAttention
    return layer


def _for_sequence_parallel(norm: type) -> type:
    """Replace torch's norm. Those of Apex and Transformer Engine already support sequence parallelism."""
    return SequenceParallelTorchNorm if norm is WrappedTorchNorm else norm

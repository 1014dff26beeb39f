"""Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from lightning_mimo.models.hugging_face.config_values import refuse
from lightning_mimo.models.hugging_face.decoder import ExpertNames
from lightning_mimo.models.hugging_face.llama import llama_size
from lightning_mimo.models.sizes import TransformerSize

QWEN3_EXPERTS = ExpertNames(
    router="mlp.gate.weight", expert="mlp.experts.{expert}.", gate="gate_proj", up="up_proj", down="down_proj"
)


def qwen2_size(config: Any, **changes: Any) -> TransformerSize:
    """Dimensions of a Qwen2Config: biases for queries, keys and values."""
    return llama_size(config, qkv_bias=True, attention_output_bias=False, **changes)


def qwen3_size(config: Any, **changes: Any) -> TransformerSize:
    """Dimensions of a Qwen3Config: norms of queries and keys."""
    return llama_size(config, qk_norm=True, **changes)


def qwen3_moe_size(config: Any) -> TransformerSize:
    """Dimensions of a Qwen3MoeConfig.

    Raises:
        ConfigError: if some layers have no experts.
    """
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise refuse(
            config,
            f"mlp_only_layers={config.mlp_only_layers} with decoder_sparse_step={config.decoder_sparse_step}",
            "Supported: experts in every layer.",
        )
    return qwen3_size(
        config,
        ffn_hidden_size=config.moe_intermediate_size,
        num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        normalize_experts=bool(config.norm_topk_prob),
    )

"""Llama 2 and 3, and Mistral: RMS norms, SwiGLU, rotary positions, grouped queries."""

from __future__ import annotations

from typing import Any

from lightning_mimo.models.hugging_face.config_values import activation_of, refuse, rotary_of
from lightning_mimo.models.sizes import TransformerSize


def llama_size(config: Any, **changes: Any) -> TransformerSize:
    """Dimensions of a LlamaConfig or MistralConfig.

    Args:
        config: of transformers.
        changes: further fields of TransformerSize, for families that add to it.

    Raises:
        ConfigError: for what the model cannot follow.
    """
    if getattr(config, "mlp_bias", False):
        raise refuse(config, "mlp_bias=True", "Supported: MLPs without biases.")
    if getattr(config, "attention_dropout", 0.0):
        raise refuse(config, f"attention_dropout={config.attention_dropout}", "Set it to 0.0 in config.json.")
    base, scaling = rotary_of(config)
    bias = bool(getattr(config, "attention_bias", False))
    fields: dict[str, Any] = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "ffn_hidden_size": config.intermediate_size,
        "head_dim": getattr(config, "head_dim", None),
        "style": "llama",
        "activation": activation_of(config, "hidden_act"),
        "layernorm_epsilon": config.rms_norm_eps,
        "qkv_bias": bias,
        "attention_output_bias": bias,
        "rotary_base": base,
        "rope_scaling": scaling,
    }
    return TransformerSize(**{**fields, **changes})

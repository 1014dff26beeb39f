"""Mixtral: a Mistral with experts."""

from __future__ import annotations

from typing import Any

from lightning_mimo.models.hugging_face.decoder import ExpertNames
from lightning_mimo.models.hugging_face.llama import llama_size
from lightning_mimo.models.sizes import TransformerSize

MIXTRAL_EXPERTS = ExpertNames(
    router="block_sparse_moe.gate.weight", expert="block_sparse_moe.experts.{expert}.", gate="w1", up="w3", down="w2"
)


def mixtral_size(config: Any) -> TransformerSize:
    """Dimensions of a MixtralConfig."""
    return llama_size(config, num_experts=config.num_local_experts, experts_per_token=config.num_experts_per_tok)

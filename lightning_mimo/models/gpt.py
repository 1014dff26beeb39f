"""ModuleSpec of a GPT from megatron-core's modules, for CPUs and GPUs, with sequence parallelism."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormInterface, WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo.errors import ConfigError
from lightning_mimo.layers.attention import AttentionKind, SdpaAttention
from lightning_mimo.layers.balancing_loss import balanced_router
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.models.sizes import RopeScaling, TransformerSize, check_divides, transformer_config
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


class BiasedRowParallelLinear(RowParallelLinear):
    """megatron-core's, with a bias where the config, which is that of the MLP too, has none."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class LanguageModel(GPTModel):
    """megatron-core's GPT, with the rotary frequencies of Llama 3.1 and a vocabulary that is padded for tp."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        pg_collection: ProcessGroupCollection,
        true_vocab_size: int | None = None,
        rotary_scaling: RopeScaling | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            config: of the transformer.
            vocab_size: rows of embeddings and head over all tensor-parallel ranks.
            pg_collection: the module's process groups on this rank.
            true_vocab_size: how many of these rows stand for tokens. The others' logits are minus infinity, so they
                count for no loss, get no gradient and are never chosen.
            rotary_scaling: as for TransformerSize.
            options: of GPTModel.
        """
        super().__init__(config, vocab_size=vocab_size, pg_collection=pg_collection, **options)
        if rotary_scaling is not None:
            # megatron-core offers the factor alone; the rest is fixed to the numbers of Llama 3.1 itself.
            self.rotary_pos_emb.inv_freq = self.rotary_pos_emb._apply_scaling(
                self.rotary_pos_emb.inv_freq,
                factor=rotary_scaling.factor,
                low_freq_factor=rotary_scaling.low_freq_factor,
                high_freq_factor=rotary_scaling.high_freq_factor,
                original_max_position_embeddings=rotary_scaling.original_max_position_embeddings,
            )
        if self.post_process and true_vocab_size is not None and true_vocab_size < vocab_size:
            rows = vocab_size // pg_collection.tp.size()
            self._tokens = max(0, min(rows, true_vocab_size - pg_collection.tp.rank() * rows))
            if self._tokens < rows:
                self.output_layer.register_forward_hook(self._exclude_padding)

    def _exclude_padding(self, layer: torch.nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> None:
        output[0][..., self._tokens :].fill_(-torch.inf)


def gpt_spec(
    infra: MimoModelInfra,
    size: TransformerSize,
    *,
    vocab_size: int,
    max_sequence_length: int,
    tie_embeddings: bool = False,
    sequence_parallel: bool = False,
    true_vocab_size: int | None = None,
) -> ModuleSpec:
    """ModuleSpec of a GPT with rotary positions, for ``MimoModelConfig(language_model_spec=...)``.

    Args:
        infra: grids and process groups of this rank.
        size: dimensions of the GPT. Encoder outputs must have its ``hidden_size``.
        vocab_size: number of token ids, including placeholders; the language module's tp must divide it.
        max_sequence_length: longest sequence in tokens.
        tie_embeddings: let the head share the weights of the word embeddings.
        sequence_parallel: divide the sequence over the tensor-parallel ranks between attention and MLP. Without tensor
            parallelism it means nothing; with it, a mixture of experts needs it.
        true_vocab_size: token ids that there are, where ``vocab_size`` is padded; ``None`` for all. The others count
            for no loss and are never chosen.

    Raises:
        LayoutError: if heads, layers, experts or the vocabulary do not divide over the layout.
    """
    tp = infra.layout.modules[LANGUAGE].tp
    config = transformer_config(infra.layout, LANGUAGE, size, sequence_parallel=sequence_parallel and tp > 1)
    check_divides("vocab_size", vocab_size, LANGUAGE, "tp", tp)
    groups = infra.pg_collections.get(LANGUAGE)
    return ModuleSpec(
        module=LanguageModel,
        params={
            "config": config,
            "transformer_layer_spec": _gpt_block(config, size, pp_rank=groups.pp.rank() if groups else 0),
            "vocab_size": vocab_size,
            "true_vocab_size": true_vocab_size,
            "rotary_base": size.rotary_base,
            "rotary_scaling": size.rope_scaling,
            "max_sequence_length": max_sequence_length,
            "position_embedding_type": "rope" if size.mrope_section is None else "mrope",
            "share_embeddings_and_output_weights": tie_embeddings,
            # MimoModel divides the sequence itself, after text and images are combined.
            "scatter_embedding_sequence_parallel": False,
            "pre_process": groups is None or groups.pp.rank() == 0,
            "post_process": groups is None or groups.pp.rank() == groups.pp.size() - 1,
            "pg_collection": groups,
        },
    )


def _gpt_block(config: TransformerConfig, size: TransformerSize, *, pp_rank: int) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, dense or with experts as the config says.

    Args:
        config: of the language module.
        size: of the language module.
        pp_rank: the stage.
    """
    layer = _gpt_layer(config, size.attention)
    if size.balancing_loss:
        experts = layer.submodules.mlp.keywords["submodules"]
        router = balanced_router(size.balancing_loss)
        layer.submodules.mlp = partial(layer.submodules.mlp, submodules=replace(experts, router=router))
    attention = layer.submodules.self_attention.submodules
    if size.attention_output_bias and not config.add_bias_linear:
        if size.attention == "te":
            raise ConfigError("attention_output_bias=True is not supported with attention='te'; choose 'sdpa'.")
        attention.linear_proj = BiasedRowParallelLinear
    for name in ("q_layernorm", "k_layernorm"):
        setattr(attention, name, _for_sequence_parallel(getattr(attention, name)))
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        setattr(layer.submodules, name, _for_sequence_parallel(getattr(layer.submodules, name)))
    # Apex has no RMS norm; Transformer Engine's layers have theirs inside of the next linear layer.
    own = config.normalization == "LayerNorm" or size.attention == "te"
    last = LayerNormImpl if own else layer.submodules.input_layernorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, pp_rank=pp_rank),
        layer_norm=_for_sequence_parallel(last),
    )


def _gpt_layer(config: TransformerConfig, attention: AttentionKind) -> ModuleSpec:
    if attention == "te":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
        )
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    if attention == "sdpa":
        layer.submodules.self_attention.submodules.core_attention = SdpaAttention
    return layer


def _for_sequence_parallel(norm: type) -> type:
    """Replace torch's norm. Those of Apex and Transformer Engine already support sequence parallelism."""
    return SequenceParallelTorchNorm if norm is WrappedTorchNorm else norm

"""A vision encoder feeding a GPT: the MimoModelConfig for images and text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal

from lightning_mimo.infra import MimoModelInfra
from lightning_mimo.initialization import fan_in_normal_
from lightning_mimo.models.gpt import gpt_block
from lightning_mimo.models.vision import ImageGrid, vision_spec
from lightning_mimo.parallelism import LANGUAGE

_EMBEDDING_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Which activations of a transformer are computed again in the backward pass in place of being kept.

    Args:
        granularity: ``full`` for whole layers; ``selective`` for ``modules`` of each layer.
        method: with ``full``: ``uniform`` keeps the input of every ``num_layers`` layers, ``block`` recomputes only the
            first ``num_layers`` of a pipeline stage.
        num_layers: see ``method``.
        modules: with ``selective``: Megatron's ``recompute_modules``, such as ``core_attn``.
    """

    granularity: Literal["full", "selective"] = "full"
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1
    modules: tuple[str, ...] = ("core_attn",)

    def settings(self) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig."""
        if self.granularity == "selective":
            return {"recompute_granularity": "selective", "recompute_modules": list(self.modules)}
        return {
            "recompute_granularity": "full",
            "recompute_method": self.method,
            "recompute_num_layers": self.num_layers,
        }


@dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """Dimensions of one transformer, with Megatron's names.

    Args:
        num_layers: transformer layers over all pipeline stages.
        hidden_size: width.
        num_attention_heads: heads; tp must divide them.
        ffn_hidden_size: width inside the MLP; ``None`` is 4 * hidden_size.
        dropout: probability for hidden states and attention.
        num_experts: experts of every MLP; ``None`` is a dense model. ep must divide them. No balancing loss is added.
        experts_per_token: experts that each token is sent to.
        recompute: which activations are computed again in the backward pass; ``None`` keeps all.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int | None = None
    dropout: float = 0.0
    num_experts: int | None = None
    experts_per_token: int = 2
    recompute: Recompute | None = None


def vision_language_config(
    infra: MimoModelInfra,
    *,
    grid: ImageGrid,
    vision: TransformerSize,
    language: TransformerSize,
    vocab_size: int,
    max_sequence_length: int,
    image_token_id: int,
    vision_module: str = "images",
    tie_embeddings: bool = False,
    sequence_parallel: bool = False,
) -> MimoModelConfig:
    """MimoModelConfig of a ViT, a two-layer projector and a GPT with rotary positions.

    Args:
        infra: grids and process groups of this rank.
        grid: how an image becomes tokens.
        vision: size of the encoder.
        language: size of the GPT.
        vocab_size: token ids, placeholders included; the language module's tp must divide it.
        max_sequence_length: longest sequence in tokens.
        image_token_id: the placeholder that stands in ``input_ids`` once for every token of an image.
        vision_module: name of the encoder's module in the layout.
        tie_embeddings: let the GPT's head share the weights of its word embeddings.
        sequence_parallel: divide the GPT's sequence over its tensor-parallel ranks between attention and MLP. Without
            tensor parallelism it means nothing; with it, a mixture of experts needs it.

    Raises:
        ValueError: if heads, layers, experts or the vocabulary do not divide over the layout.
    """
    encoder_config = _transformer_config(infra, vision_module, vision)
    projector_config = _transformer_config(
        infra,
        vision_module,
        TransformerSize(
            num_layers=vision.num_layers,
            hidden_size=language.hidden_size,
            num_attention_heads=vision.num_attention_heads,
            ffn_hidden_size=language.hidden_size,
        ),
    )
    return MimoModelConfig(
        language_model_spec=gpt_spec(
            infra,
            language,
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            tie_embeddings=tie_embeddings,
            sequence_parallel=sequence_parallel,
        ),
        modality_submodules_spec={
            vision_module: vision_spec(
                grid=grid,
                encoder=encoder_config,
                projector=projector_config,
                pg_collection=infra.pg_collections.get(vision_module),
            )
        },
        special_token_ids={vision_module: image_token_id},
    )


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
        size: of the GPT; what encoders return has its ``hidden_size``.
        vocab_size: token ids, placeholders included; the language module's tp must divide it.
        max_sequence_length: longest sequence in tokens.
        tie_embeddings: as for :func:`vision_language_config`.
        sequence_parallel: as for :func:`vision_language_config`.

    Raises:
        ValueError: if heads, layers, experts or the vocabulary do not divide over the layout.
    """
    sizes = infra.layout.modules[LANGUAGE]
    config = _transformer_config(infra, LANGUAGE, size, sequence_parallel=sequence_parallel and sizes.tp > 1)
    _check_divides("vocab_size", vocab_size, LANGUAGE, "tp", sizes.tp)
    groups = infra.pg_collections.get(LANGUAGE)
    return ModuleSpec(
        module=GPTModel,
        params={
            "config": config,
            "transformer_layer_spec": gpt_block(config, pp_rank=groups.pp.rank() if groups else 0),
            "vocab_size": vocab_size,
            "max_sequence_length": max_sequence_length,
            "position_embedding_type": "rope",
            "share_embeddings_and_output_weights": tie_embeddings,
            # MimoModel cuts the sequence itself, when text and images are together.
            "scatter_embedding_sequence_parallel": False,
            "pre_process": groups is None or groups.pp.rank() == 0,
            "post_process": groups is None or groups.pp.rank() == groups.pp.size() - 1,
            "pg_collection": groups,
        },
    )


def _transformer_config(
    infra: MimoModelInfra, module: str, size: TransformerSize, *, sequence_parallel: bool = False
) -> TransformerConfig:
    sizes = infra.layout.modules[module]
    _check_divides("num_attention_heads", size.num_attention_heads, module, "tp", sizes.tp)
    _check_divides("num_layers", size.num_layers, module, "pp", sizes.pp)
    if size.num_experts is not None:
        _check_divides("num_experts", size.num_experts, module, "ep", sizes.ep)
        if sizes.tp > 1 and not sequence_parallel:
            raise ValueError(
                f"Module {module!r}: a mixture of experts with tp={sizes.tp} needs sequence_parallel=True, or each "
                f"token would be sent to its experts {sizes.tp} times."
            )
    return TransformerConfig(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        num_attention_heads=size.num_attention_heads,
        ffn_hidden_size=size.ffn_hidden_size or 4 * size.hidden_size,
        hidden_dropout=size.dropout,
        attention_dropout=size.dropout,
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        sequence_parallel=sequence_parallel,
        num_moe_experts=size.num_experts,
        moe_router_topk=size.experts_per_token,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.expt_tp,
        moe_token_dispatcher_type="alltoall",
        # A balancing loss is taken over the samples of one rank, so it would not be the same in every layout.
        moe_router_load_balancing_type="none",
        add_bias_linear=size.num_experts is None,
        init_method=fan_in_normal_,
        output_layer_init_method=partial(fan_in_normal_, gain=1.0 / math.sqrt(2 * size.num_layers)),
        embedding_init_method=init_method_normal(_EMBEDDING_STD),
        embedding_init_method_std=_EMBEDDING_STD,
        pipeline_dtype=torch.float32,  # must be set for pipelines; the run's precision takes its place
        moe_router_dtype="fp32" if size.num_experts else None,
        **(size.recompute.settings() if size.recompute else {}),
    )


def _check_divides(what: str, number: int, module: str, axis: str, size: int) -> None:
    if number % size:
        raise ValueError(
            f"Module {module!r}: {axis}={size} does not divide {what}={number} ({number} / {size} = "
            f"{number / size:g}). Choose a {axis} that does, or another {what}."
        )

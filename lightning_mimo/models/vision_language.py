"""A vision encoder feeding a GPT: the MimoModelConfig for images and text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal

from lightning_mimo.infra import MimoModelInfra
from lightning_mimo.initialization import fan_in_normal_
from lightning_mimo.models.vision import ImageGrid, vision_spec
from lightning_mimo.parallelism import LANGUAGE

_EMBEDDING_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """Dimensions of one transformer, with Megatron's names.

    Args:
        num_layers: transformer layers over all pipeline stages.
        hidden_size: width.
        num_attention_heads: heads; tp must divide them.
        ffn_hidden_size: width inside the MLP; ``None`` is 4 * hidden_size.
        dropout: probability for hidden states and attention.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int | None = None
    dropout: float = 0.0


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
) -> MimoModelConfig:
    """MimoModelConfig of a ViT, a two-layer projector and a GPT with rotary positions and an untied head.

    Args:
        infra: grids and process groups of this rank.
        grid: how an image becomes tokens.
        vision: size of the encoder.
        language: size of the GPT.
        vocab_size: token ids, placeholders included; the language module's tp must divide it.
        max_sequence_length: longest sequence in tokens.
        image_token_id: the placeholder that stands in ``input_ids`` once for every token of an image.
        vision_module: name of the encoder's module in the layout.

    Raises:
        ValueError: if heads or layers or the vocabulary do not divide over the layout.
    """
    encoder_config = _transformer_config(infra, vision_module, vision)
    language_config = _transformer_config(infra, LANGUAGE, language)
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
    _check_divides("vocab_size", vocab_size, LANGUAGE, "tp", infra.layout.modules[LANGUAGE].tp)
    groups = infra.pg_collections.get(LANGUAGE)
    return MimoModelConfig(
        language_model_spec=ModuleSpec(
            module=GPTModel,
            params={
                "config": language_config,
                "transformer_layer_spec": get_gpt_layer_local_spec(),
                "vocab_size": vocab_size,
                "max_sequence_length": max_sequence_length,
                "position_embedding_type": "rope",
                "pre_process": groups is None or groups.pp.rank() == 0,
                "post_process": groups is None or groups.pp.rank() == groups.pp.size() - 1,
                "pg_collection": groups,
            },
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


def _transformer_config(infra: MimoModelInfra, module: str, size: TransformerSize) -> TransformerConfig:
    sizes = infra.layout.modules[module]
    _check_divides("num_attention_heads", size.num_attention_heads, module, "tp", sizes.tp)
    _check_divides("num_layers", size.num_layers, module, "pp", sizes.pp)
    return TransformerConfig(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        num_attention_heads=size.num_attention_heads,
        ffn_hidden_size=size.ffn_hidden_size or 4 * size.hidden_size,
        hidden_dropout=size.dropout,
        attention_dropout=size.dropout,
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        init_method=fan_in_normal_,
        output_layer_init_method=partial(fan_in_normal_, gain=1.0 / math.sqrt(2 * size.num_layers)),
        embedding_init_method=init_method_normal(_EMBEDDING_STD),
        embedding_init_method_std=_EMBEDDING_STD,
        pipeline_dtype=torch.float32,
    )


def _check_divides(what: str, number: int, module: str, axis: str, size: int) -> None:
    if number % size:
        raise ValueError(
            f"Module {module!r}: {axis}={size} does not divide {what}={number} ({number} / {size} = "
            f"{number / size:g}). Choose a {axis} that does, or another {what}."
        )

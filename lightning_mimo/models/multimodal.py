"""MimoModelConfig of encoders of several modalities and a GPT."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron.core.models.mimo import MimoModelConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.models.audio import ClipPatches, audio_spec
from lightning_mimo.models.gpt import gpt_spec
from lightning_mimo.models.sizes import TransformerSize, check_divides, mlp_config, transformer_config
from lightning_mimo.models.vision import ImagePatches, vision_spec
from lightning_mimo.parallel.infra import MimoModelInfra


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Configuration of one modality: an encoder and a two-layer projector into the language module.

    Args:
        patches: division of an item (an image, a clip) into tokens; its type selects the type of the encoder.
        size: dimensions of the encoder's transformer.
        token_id: id of the placeholder, which occurs in ``input_ids`` once per token of an item.
    """

    patches: ImagePatches | ClipPatches
    size: TransformerSize
    token_id: int


def multimodal_config(
    infra: MimoModelInfra,
    *,
    encoders: Mapping[str, Encoder],
    language: TransformerSize,
    vocab_size: int,
    max_sequence_length: int,
    tie_embeddings: bool = False,
    sequence_parallel: bool = False,
) -> MimoModelConfig:
    """MimoModelConfig of encoders with projectors and a GPT with rotary positions.

    In ``modality_inputs``, an image encoder is called ``vit`` and takes ``pixel_values``; an audio encoder is called
    ``clips`` and takes ``features``.

    Args:
        infra: grids and process groups of this rank.
        encoders: module name in the layout -> configuration of the encoder.
        language: dimensions of the GPT.
        vocab_size: number of token ids, including placeholders; the language module's tp must divide it.
        max_sequence_length: longest sequence in tokens.
        tie_embeddings: share the weights of the GPT's word embeddings with its output layer.
        sequence_parallel: divide the GPT's sequence over its tensor-parallel ranks between attention and MLP. It has no
            effect if tp=1, and is required for a mixture of experts if tp > 1.

    Raises:
        LayoutError: if a module is not in the layout, or heads, layers, experts or the vocabulary do not divide over
            it.
    """
    if not encoders.keys() <= infra.layout.modules.keys():  # users may add other modules to the returned config
        infra.layout.check_modules([*encoders, LANGUAGE])
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
            name: _encoder_spec(infra, name, encoder, language) for name, encoder in encoders.items()
        },
        special_token_ids={name: encoder.token_id for name, encoder in encoders.items()},
    )


def _encoder_spec(infra: MimoModelInfra, name: str, encoder: Encoder, language: TransformerSize) -> ModuleSpec:
    config = transformer_config(infra.layout, name, encoder.size)
    tp = infra.layout.modules[name].tp
    check_divides("hidden_size of the language module", language.hidden_size, name, "tp", tp)
    projector = mlp_config(
        infra.layout,
        name,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.hidden_size,
        output_gain=1.0 / math.sqrt(2 * encoder.size.num_layers),  # same gain as the last layer of the encoder's MLPs
    )
    spec: Callable[..., ModuleSpec] = audio_spec if isinstance(encoder.patches, ClipPatches) else vision_spec
    return spec(
        patches=encoder.patches,
        encoder=config,
        projector=projector,
        pg_collection=infra.pg_collections.get(name),
        attention=encoder.size.attention,
    )

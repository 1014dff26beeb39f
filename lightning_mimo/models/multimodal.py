"""Encoders of several modalities feeding a GPT: the MimoModelConfig."""

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
    """One modality: an encoder and a two-layer projector into the language module.

    Args:
        patches: how an item (an image, a clip) becomes tokens; decides what kind of encoder it is.
        size: of the encoder's transformer.
        token_id: the placeholder that stands in ``input_ids`` once for every token of an item.
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

    In ``modality_inputs`` an encoder of images is called ``vit`` and takes ``pixel_values``, one of clips is called
    ``clips`` and takes ``features``.

    Args:
        infra: grids and process groups of this rank.
        encoders: module name of the layout -> what it encodes.
        language: size of the GPT.
        vocab_size: token ids, placeholders included; the language module's tp must divide it.
        max_sequence_length: longest sequence in tokens.
        tie_embeddings: let the GPT's head share the weights of its word embeddings.
        sequence_parallel: divide the GPT's sequence over its tensor-parallel ranks between attention and MLP. Without
            tensor parallelism it means nothing; with it, a mixture of experts needs it.

    Raises:
        LayoutError: if a module is not in the layout, or heads, layers, experts or the vocabulary do not divide over
            it.
    """
    if not encoders.keys() <= infra.layout.modules.keys():  # more may be added to the config that is returned
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
        output_gain=1.0 / math.sqrt(2 * encoder.size.num_layers),  # as the last layer of the encoder's MLPs
    )
    spec: Callable[..., ModuleSpec] = audio_spec if isinstance(encoder.patches, ClipPatches) else vision_spec
    return spec(
        patches=encoder.patches,
        encoder=config,
        projector=projector,
        pg_collection=infra.pg_collections.get(name),
        attention=encoder.size.attention,
    )

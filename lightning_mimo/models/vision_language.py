"""MimoModelConfig of a vision encoder and a GPT, for images and text."""

from __future__ import annotations

from megatron.core.models.mimo import MimoModelConfig

from lightning_mimo.models.multimodal import Encoder, multimodal_config
from lightning_mimo.models.sizes import Recompute, TransformerSize
from lightning_mimo.models.vision import ImagePatches
from lightning_mimo.parallel.infra import MimoModelInfra

__all__ = ["Recompute", "TransformerSize", "vision_language_config"]


def vision_language_config(
    infra: MimoModelInfra,
    *,
    patches: ImagePatches,
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
        patches: division of an image into patches and tokens.
        vision: dimensions of the encoder.
        language: dimensions of the GPT.
        vocab_size: number of token ids, including placeholders; the language module's tp must divide it.
        max_sequence_length: longest sequence in tokens.
        image_token_id: id of the placeholder, which occurs in ``input_ids`` once per token of an image.
        vision_module: name of the encoder's module in the layout.
        tie_embeddings: share the weights of the GPT's word embeddings with its output layer.
        sequence_parallel: divide the GPT's sequence over its tensor-parallel ranks between attention and MLP. It has no
            effect if tp=1, and is required for a mixture of experts if tp > 1.

    Raises:
        LayoutError: if heads, layers, experts or the vocabulary do not divide over the layout.
    """
    return multimodal_config(
        infra,
        encoders={vision_module: Encoder(patches=patches, size=vision, token_id=image_token_id)},
        language=language,
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        tie_embeddings=tie_embeddings,
        sequence_parallel=sequence_parallel,
    )

"""What is private in transformers, which is an extra: nothing is imported here."""

from __future__ import annotations

from lightning_mimo.upstream import Attribute

ATTRIBUTES = (
    Attribute(
        "transformers.PreTrainedModel",
        "_from_config",
        "a tower of a given class; from_config is of the Auto classes only",
    ),
    Attribute(
        "transformers.models.llava.processing_llava.LlavaProcessor",
        "_get_num_multimodal_tokens",
        "placeholders of an image by its size alone, as vLLM asks processors for them",
    ),
)

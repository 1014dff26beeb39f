"""A sample as large as the model allows, from the description of the model alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from lightning_mimo.data.sample_format import Sample
from lightning_mimo.models.audio import ClipPatches
from lightning_mimo.models.vision import ImagePatches


@dataclass(frozen=True, kw_only=True)
class ExampleSample:
    """A sample with one item for each encoder, and text up to the longest sequence.

    Attributes:
        sample: as a dataset returns it.
        tokens: length of its text, with placeholders.
    """

    sample: Sample
    tokens: int


def example_sample(config: MimoModelConfig) -> ExampleSample | str:
    """Make a sample for a model, or say why its description does not tell the shapes.

    Args:
        config: describes the model.
    """
    language = config.language_model_spec.params
    length = language.get("max_sequence_length")
    if not isinstance(length, int):
        return "the language module's spec has no max_sequence_length"
    placeholders: list[int] = []
    inputs: dict[str, Any] = {}
    for name, spec in config.modality_submodules_spec.items():
        encoders = (spec.submodules or {}).get("encoders", {})
        patches = list({id(each): each for each in _patches_in(encoders)}.values())
        if len(encoders) != 1 or len(patches) != 1:
            return f"the encoder of module {name!r} is none of patches of images or clips of one size"
        key, value = _item(patches[0])
        inputs[name] = {next(iter(encoders)): {key: value}}
        placeholders += [config.special_token_ids[name]] * patches[0].tokens_per_item
    if len(placeholders) >= length:
        return f"one item of each encoder takes {len(placeholders)} of max_sequence_length={length} tokens"
    other = next(token for token in range(len(placeholders) + 2) if token not in config.special_token_ids.values())
    ids = torch.full((length,), other, dtype=torch.int64)
    ids[: len(placeholders)] = torch.tensor(placeholders, dtype=torch.int64)
    sample = {
        "input_ids": ids,
        "labels": torch.full((length,), other, dtype=torch.int64),
        "loss_mask": (ids == other).to(torch.float32),
        "modality_inputs": inputs,
    }
    return ExampleSample(sample=sample, tokens=length)


def _item(patches: ImagePatches | ClipPatches) -> tuple[str, torch.Tensor]:
    """Argument of the encoder, and one item."""
    if isinstance(patches, ImagePatches):
        return "pixel_values", torch.zeros(1, patches.channels, patches.image_size, patches.image_size)
    return "features", torch.zeros(1, patches.frames, patches.bins)


def _patches_in(value: Any) -> Iterator[ImagePatches | ClipPatches]:
    if isinstance(value, ImagePatches | ClipPatches):
        yield value
    elif isinstance(value, ModuleSpec):
        yield from _patches_in([value.params, value.submodules])
    elif isinstance(value, dict):
        yield from _patches_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _patches_in(each)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _patches_in([getattr(value, field.name) for field in fields(value)])

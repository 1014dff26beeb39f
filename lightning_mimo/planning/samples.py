"""The sample that an estimate is made for: the longest one that a model takes, or the largest one of a dataset."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch
from megatron.core.utils import unwrap_model

from lightning_mimo.data.sample_format import Sample
from lightning_mimo.planning.depths import depths_of, with_layers
from lightning_mimo.planning.fake_world import as_rank, build_on_meta
from lightning_mimo.planning.rank_step import StepSettings, TrainingProgram


@runtime_checkable
class ShowsInputs(Protocol):
    """An encoder that says what its inputs look like, so that a step can be estimated without data."""

    def example_inputs(self, items: int) -> tuple[dict[str, torch.Tensor], int]:
        """Arguments of ``forward`` that hold a number of items of the usual size, and the embeddings of each item."""


@dataclass(frozen=True, kw_only=True)
class SampleSizes:
    """Sizes of the samples of a dataset that were looked at.

    Attributes:
        number: samples that were looked at.
        tokens: tokens of each.
        placeholders: module -> placeholder tokens of each, that is, embeddings of its encoder.
        largest: index of the largest one, which has the most tokens and placeholders together, each relative to the
            most in any sample.
    """

    number: int
    tokens: Sequence[int]
    placeholders: Mapping[str, Sequence[int]]
    largest: int

    def lines(self) -> Iterator[str]:
        """Mean, 95th percentile and largest number, one line each for tokens and for every module.

        One line more for a module that the largest sample gives nothing to do, as where no sample has both images and
        audio.
        """
        for what, numbers in (("tokens", self.tokens), *((f"tokens of {k}", v) for k, v in self.placeholders.items())):
            high = sorted(numbers)[math.ceil(0.95 * len(numbers)) - 1]
            yield f"{what}: mean {sum(numbers) / len(numbers):.0f}, 95 % up to {high}, at most {max(numbers)}"
        for name, numbers in self.placeholders.items():
            if any(numbers) and not numbers[self.largest]:
                yield f"the largest sample has no tokens of {name}: its work on others is not counted"


def longest_sample(settings: StepSettings, program: TrainingProgram) -> Sample | str:
    """A sample of ``max_sequence_length`` tokens with one item for each encoder, or why there is none.

    torch.distributed must not be initialized in this process.
    """
    placeholders: dict[str, int] = {}
    inputs: dict[str, dict[str, Any]] = {}
    for name, sizes in settings.layout.modules.items():
        with as_rank(settings.layout, sizes.ranks[0]) as infra:
            stages = dict.fromkeys(infra.participating_modules, 0)
            few = {each: depth.few for each, depth in depths_of(program.configure(infra), stages).items()}
            configure = with_layers(program.configure, settings.layout, few)
            model = build_on_meta(configure, infra, settings.dtype_policy)
        limits = model.sample_limits()
        if name not in model.modality_submodules:
            continue
        inputs[name] = {}
        for encoder_name, encoder in unwrap_model(model.modality_submodules[name]).encoders.items():
            if not isinstance(encoder, ShowsInputs):
                return f"{type(encoder).__name__} of module {name!r} does not say what its inputs look like"
            inputs[name][encoder_name], embeddings = encoder.example_inputs(1)
            placeholders[name] = embeddings
    length, special = limits["max_sequence_length"], model.special_token_ids
    if length is None:
        return "the language module has no max_sequence_length"
    if sum(placeholders.values()) >= length:
        return f"one item for each encoder has more tokens than max_sequence_length={length}"
    return _sample(length, {special[name]: number for name, number in placeholders.items()}, special.values(), inputs)


def special_tokens(settings: StepSettings, program: TrainingProgram) -> dict[str, int]:
    """Module -> its placeholder token. torch.distributed must not be initialized in this process."""
    with as_rank(settings.layout, 0) as infra:
        return dict(program.configure(infra).special_token_ids)


def _sample(
    length: int, placeholders: Mapping[int, int], special: Sequence[int] | Any, inputs: Mapping[str, Any]
) -> Sample:
    text = next(token for token in count(1) if token not in special)
    ids = [token for token, number in placeholders.items() for _ in range(number)]
    input_ids = torch.tensor(ids + [text] * (length - len(ids)))
    return {"input_ids": input_ids, "labels": torch.full((length,), text), "modality_inputs": dict(inputs)}


def look_at(samples: Sequence[Sample], special_token_ids: Mapping[str, int]) -> tuple[SampleSizes, Sample]:
    """Sizes of samples, and the largest of them.

    Args:
        samples: as a dataset returns them.
        special_token_ids: module -> its placeholder.
    """
    ids = [torch.as_tensor(sample["input_ids"]) for sample in samples]
    tokens = [each.numel() for each in ids]
    placeholders = {name: [int((each == token).sum()) for each in ids] for name, token in special_token_ids.items()}
    shares = [[number / (max(numbers) or 1) for number in numbers] for numbers in (tokens, *placeholders.values())]
    sums = [sum(each) for each in zip(*shares, strict=True)]
    largest = sums.index(max(sums))
    sizes = SampleSizes(number=len(samples), tokens=tokens, placeholders=placeholders, largest=largest)
    return sizes, samples[largest]

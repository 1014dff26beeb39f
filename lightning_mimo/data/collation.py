"""The samples that a rank has loaded of one global batch, made into the microbatches of the schedule."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from lightning_mimo.data.shared_memory import SharedMemoryBatch
from lightning_mimo.errors import DataError
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch, ModalityCounts, token_order

Sample = Mapping[str, Any]
"""``{"input_ids": [S], "labels": [S], "loss_mask": [S], "modality_inputs": {module: {encoder: {arg: [n, …]}}}}``"""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One sample that this rank loads.

    Attributes:
        index: index in the user's dataset.
        position: position in the global batch.
        modules: modules of this rank that use it.
        epoch: counted from 0; part of the augmentation seed.
        is_padding: whether it only fills up a short last batch: it then counts for nothing.
    """

    index: int
    position: int
    modules: frozenset[str]
    epoch: int
    is_padding: bool


class MicrobatchCollator:
    """Turns this rank's samples of one global batch into a list of microbatches."""

    def __init__(self, plan: RankBatchPlan, *, special_token_ids: Mapping[str, int], pad_token_id: int) -> None:
        """
        Args:
            plan: which samples belong to which microbatch and module.
            special_token_ids: encoder name -> its placeholder in ``input_ids``.
            pad_token_id: fills up sequences that are shorter than the longest of their microbatch.

        Raises:
            DataError: if the pad token is also a placeholder.
        """
        for name, token in special_token_ids.items():
            if token == pad_token_id:
                raise DataError(
                    f"pad_token_id={pad_token_id} is also the placeholder of module {name!r}, so padding would ask for "
                    f"embeddings. Choose another pad_token_id in your MimoModule."
                )
        self._plan = plan
        self._special_token_ids = dict(special_token_ids)
        self._pad_token_id = pad_token_id

    def __call__(self, loaded: Sequence[tuple[SampleRequest, Sample]]) -> list[Microbatch]:
        by_position = {request.position: (request, sample) for request, sample in loaded}
        return SharedMemoryBatch(self._microbatch(by_position, each) for each in range(self._plan.num_microbatches))

    def _microbatch(self, loaded: Mapping[int, tuple[SampleRequest, Sample]], microbatch: int) -> Microbatch:
        texts = [loaded[position] for position in self._plan.text_samples(microbatch)]
        batch = self._text(texts)
        batch["global_positions"] = tuple(self._plan.text_samples(microbatch))
        batch["modality_inputs"] = {}
        batch["modality_counts"] = {}
        for module, runs in self._plan.shards.items():
            if module == LANGUAGE:
                continue
            own = runs[microbatch]
            samples = [loaded[position] for position in own]
            batch["modality_inputs"][module] = _concatenate(module, samples)
            batch["modality_counts"][module] = self._counts(
                module, loaded, self._plan.bridge_samples(module, microbatch), own
            )
        batch["sample_fingerprints"] = {
            module: torch.tensor([_fingerprint_of(*loaded[position]) for position in runs[microbatch]])
            for module, runs in self._plan.shards.items()
        }
        return batch

    def _text(self, texts: Sequence[tuple[SampleRequest, Sample]]) -> Microbatch:
        input_ids = _pad([sample["input_ids"] for _, sample in texts], self._pad_token_id)
        batch: Microbatch = {
            "input_ids": input_ids,
            "position_ids": torch.arange(input_ids.size(1)).expand_as(input_ids),
            "sample_indices": tuple(request.index for request, _ in texts),
            "is_padding": tuple(request.is_padding for request, _ in texts),
            "lengths": torch.tensor([len(sample["input_ids"]) for _, sample in texts]),
            # Plain numbers: both sides of a bridge know from them what comes, without asking the device.
            "placeholders": {
                module: tuple(_occurrences(sample, token) for _, sample in texts)
                for module, token in self._special_token_ids.items()
            },
        }
        if LANGUAGE in self._plan.shards:
            masks = [sample["loss_mask"] * (0 if request.is_padding else 1) for request, sample in texts]
            batch["labels"] = _pad([sample["labels"] for _, sample in texts], 0)
            batch["loss_mask"] = _pad(masks, 0)
            batch["token_order"] = token_order(input_ids, self._special_token_ids)
        return batch

    def _counts(
        self, module: str, loaded: Mapping[int, tuple[SampleRequest, Sample]], seen: range, own: range
    ) -> ModalityCounts:
        token = self._special_token_ids[module]
        return ModalityCounts(
            sample_indices=tuple(loaded[position][0].index for position in seen),
            placeholders=tuple(_occurrences(loaded[position][1], token) for position in seen),
            own=range(own.start - seen.start, own.stop - seen.start),
            items=tuple(_items(module, *loaded[position]) if module in self._plan.loads else 0 for position in own),
        )


def _fingerprint_of(request: SampleRequest, sample: Sample) -> tuple[int, int, int]:
    """Position, index and checksum of the text, which ``sample_check`` compares over the ranks."""
    return request.position, request.index, zlib.crc32(sample["input_ids"].numpy().tobytes())


def _occurrences(sample: Sample, token: int) -> int:
    return int(np.count_nonzero(sample["input_ids"].numpy() == token))


def _pad(sequences: list[torch.Tensor], value: int) -> torch.Tensor:
    return pad_sequence(sequences, batch_first=True, padding_value=value)


def _items(module: str, request: SampleRequest, sample: Sample) -> int:
    """Number of images (clips, …) of one sample, checked over all encoder arguments."""
    numbers = {
        f"{encoder}.{name}": value.size(0)
        for encoder, arguments in sample.get("modality_inputs", {}).get(module, {}).items()
        for name, value in arguments.items()
    }
    if len(set(numbers.values())) > 1:
        raise DataError(
            f"Sample {request.index}: the inputs of module {module!r} differ in their first dimension, the number of "
            f"items: {numbers}. They must agree."
        )
    return next(iter(numbers.values()), 0)


def _concatenate(
    module: str, loaded: Sequence[tuple[SampleRequest, Sample]]
) -> dict[str, dict[str, torch.Tensor]] | None:
    """``{encoder: {arg: [items of all samples, …]}}``, or None where no sample says what the arguments look like.

    Where there is not one item, an item of zeros stands in, because few encoders take an empty batch; the model drops
    its embeddings again, so every parameter still gets its (zero) gradient.
    """
    inputs = [sample.get("modality_inputs", {}).get(module) for _, sample in loaded]
    inputs = [each for each in inputs if each]
    if not inputs:
        return None
    result: dict[str, dict[str, torch.Tensor]] = {}
    for encoder, arguments in inputs[0].items():
        result[encoder] = {}
        for name in arguments:
            together = torch.cat([each[encoder][name] for each in inputs])
            if together.size(0) == 0:
                together = together.new_zeros((1, *together.shape[1:]))
            result[encoder][name] = together
    return result

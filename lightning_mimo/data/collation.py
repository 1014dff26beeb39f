"""The samples that a rank has loaded of one global batch, made into the microbatches of the schedule."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info

from lightning_mimo.data.encoder_inputs import (
    EncoderInputs,
    check_modules,
    check_same_arguments,
    concatenate,
    names_for_every_stage,
    read_inputs,
)
from lightning_mimo.data.packing import Packing
from lightning_mimo.data.sample_check import NOT_LOADED
from lightning_mimo.data.sample_format import Sample, SampleFormat, Text, check_keys, read_ids, read_text
from lightning_mimo.data.shared_memory import SharedMemoryBatch
from lightning_mimo.data.tensors import IGNORED
from lightning_mimo.errors import DataError
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch, ModalityCounts, Ragged, token_order

_BYTES_OF_A_FINGERPRINT = 256  # of an argument of an encoder
_DTYPES_OF_NUMPY = frozenset({torch.int64, torch.float32, torch.float64})


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One sample that this rank loads.

    Attributes:
        index: index in the user's dataset.
        position: position in the global batch, from which follow its microbatch and its replicas.
        drawn: the number of its row in the global batch as the sampler ordered it, from 0: the position, unless
            batches are balanced. Without packing, each sample is a row.
        place: place in the row; 0 without packing.
        modules: modules of this rank that use it.
        epoch: counted from 0; part of the augmentation seed.
        is_padding: whether it only fills up a short last batch: it then counts for nothing.
    """

    index: int
    position: int
    drawn: int
    place: int = 0
    modules: frozenset[str]
    epoch: int
    is_padding: bool


@dataclass(frozen=True, kw_only=True)
class LoadedSample:
    """A sample, read and checked.

    Attributes:
        request: what was asked for.
        input_ids: int64 ``[S]``.
        placeholders: encoder module -> its placeholders in ``input_ids``.
        text: labels and the like; ``None`` where the language module of this rank does not take the sample.
        inputs: encoder module -> its inputs; of the modules that load the sample.
    """

    request: SampleRequest
    input_ids: torch.Tensor
    placeholders: Mapping[str, int]
    text: Text | None
    inputs: Mapping[str, EncoderInputs]


Rows = Mapping[int, Sequence[LoadedSample]]
"""Position in the global batch -> the samples there: one, or several that are packed in a row."""


class MicrobatchCollator:
    """Turns this rank's samples of one global batch into a list of microbatches."""

    def __init__(self, plan: RankBatchPlan, expected: SampleFormat, *, packing: Packing | None = None) -> None:
        """
        Args:
            plan: which samples belong to which microbatch and module.
            expected: what samples hold.
            packing: how the samples became rows; ``None`` for one sample a row.
        """
        self._plan = plan
        self._expected = expected
        self._packing = packing

    def __call__(self, loaded: Sequence[tuple[SampleRequest, Sample]]) -> list[Microbatch]:
        samples = [self._read(request, sample) for request, sample in loaded]
        for module in self._plan.loads - {LANGUAGE}:
            read = (sample.inputs.get(module) for sample in samples)
            check_same_arguments(module, [inputs for inputs in read if inputs is not None])
        rows: dict[int, list[LoadedSample]] = {}
        for sample in samples:
            rows.setdefault(sample.request.position, []).append(sample)
        batch = SharedMemoryBatch(self._microbatch(rows, each) for each in range(self._plan.num_microbatches))
        return batch if get_worker_info() is None else batch.packed()

    def _read(self, request: SampleRequest, sample: Sample) -> LoadedSample:
        index, expected = request.index, self._expected
        check_keys(index, sample, expected)
        check_modules(index, sample, expected.modules)
        text = read_text(index, sample, expected) if LANGUAGE in request.modules else None
        ids = read_ids(index, sample, expected) if text is None else text.input_ids
        tokens = ids.numpy()
        placeholders = {
            name: int(np.count_nonzero(tokens == token)) for name, token in expected.special_token_ids.items()
        }
        inputs = {name: read_inputs(index, sample, name, expected) for name in request.modules - {LANGUAGE}}
        for name, each in inputs.items():
            _check_placeholders(name, each, placeholders.get(name, 0))
        if self._packing is not None:
            _check_length(index, len(ids), int(self._packing.lengths[index]))
        return LoadedSample(request=request, input_ids=ids, placeholders=placeholders, text=text, inputs=inputs)

    def _microbatch(self, rows: Rows, microbatch: int) -> Microbatch:
        positions = self._plan.text_samples(microbatch)
        batch = self._text(_samples_at(positions, rows))
        batch["placeholders"] = {
            module: tuple(sum(sample.placeholders[module] for sample in rows[position]) for position in positions)
            for module in self._expected.special_token_ids
        }
        batch["modality_inputs"] = {}
        batch["modality_counts"] = {}
        for module, runs in self._plan.shards.items():
            if module == LANGUAGE:
                continue
            own = runs[microbatch]
            is_loaded = module in self._plan.loads
            inputs = [sample.inputs[module] for sample in _samples_at(own, rows)] if is_loaded else []
            batch["modality_inputs"][module] = concatenate(module, inputs, self._expected)
            batch["modality_counts"][module] = self._counts(
                module, rows, self._plan.bridge_samples(module, microbatch), own
            )
        batch["sample_fingerprints"] = {
            module: np.array([_fingerprint_of(module, sample) for sample in _samples_at(runs[microbatch], rows)])
            for module, runs in self._plan.shards.items()
        }
        return batch

    def _text(self, samples: Sequence[LoadedSample]) -> Microbatch:
        input_ids = self._lay_out([sample.input_ids for sample in samples], self._expected.pad_token_id)
        lengths = tuple(len(sample.input_ids) for sample in samples)
        batch: Microbatch = {
            "input_ids": input_ids,
            "position_ids": torch.arange(input_ids.size(1)).expand_as(input_ids),
            "global_positions": tuple(sample.request.drawn for sample in samples),
            "sample_indices": tuple(sample.request.index for sample in samples),
            "is_padding": tuple(sample.request.is_padding for sample in samples),
            "lengths": torch.tensor(lengths),
            # Plain numbers, as those of placeholders: what comes is known without asking the device.
            "sample_lengths": lengths,
            "is_packed": self._packing is not None,
        }
        if LANGUAGE in self._plan.shards:
            texts = [sample.text for sample in samples if sample.text is not None]
            assert len(texts) == len(samples), "a language rank reads the text of all its samples"
            batch.update(cast(Microbatch, self._language(texts, [sample.request for sample in samples])))
            batch["token_order"] = token_order(input_ids, self._expected.special_token_ids)
        return batch

    def _language(self, texts: Sequence[Text], requests: Sequence[SampleRequest]) -> dict[str, Any]:
        """What only the language module is given."""
        fills = [request.is_padding for request in requests]
        labels = [
            torch.full_like(text.labels, IGNORED) if fill else text.labels
            for text, fill in zip(texts, fills, strict=True)
        ]
        masks = [
            torch.zeros_like(text.loss_mask) if fill else text.loss_mask
            for text, fill in zip(texts, fills, strict=True)
        ]
        widest = torch.float64 if any(mask.dtype == torch.float64 for mask in masks) else torch.float32
        batch: dict[str, Any] = {
            "labels": self._lay_out(labels, IGNORED),
            "loss_mask": self._lay_out([mask.to(widest) for mask in masks], 0),
            # Where samples follow each other, each begins at 0 again.
            "custom_positions": self._packing is not None or any(text.position_ids is not None for text in texts),
        }
        if self._expected.position_type == "mrope" or batch["custom_positions"]:
            batch["position_ids"] = self._positions(texts)
        for key in self._expected.extra_keys:
            batch[key] = self._extra(
                key,
                [text.extras[key] for text in texts],
                per_token=all(_length(text.extras[key]) == len(text.input_ids) for text in texts),
                indices=[request.index for request in requests],
            )
        return batch

    def _lay_out(self, sequences: Sequence[torch.Tensor], value: float) -> torch.Tensor:
        """``[S, ...]`` of each sample -> ``[b, s, ...]`` padded with a value, or ``[1, s, ...]`` packed."""
        if self._packing is not None:
            return torch.cat(list(sequences)).unsqueeze(0)
        return pad_sequence(list(sequences), batch_first=True, padding_value=value)

    def _positions(self, texts: Sequence[Text]) -> torch.Tensor:
        """int64 ``[b, s]``, or ``[3, b, s]`` for positions in space or where a sample has it so."""
        plain = [
            torch.arange(len(text.input_ids)) if text.position_ids is None else text.position_ids for text in texts
        ]
        if self._expected.position_type != "mrope" and all(positions.ndim == 1 for positions in plain):
            return self._lay_out(plain, 0)
        # The dimension that differs must be the first.
        columns = [positions.expand(3, -1).T for positions in plain]
        return self._lay_out(columns, 0).permute(2, 0, 1).contiguous()

    def _extra(self, key: str, values: list[Any], *, per_token: bool, indices: Sequence[int]) -> Any:
        """Numbers as ``[n]``; tensors as ``[n, ...]``, or ``[b, s, ...]`` if they have an entry for each token; else a
        tuple."""
        if all(isinstance(value, bool | int | float | np.number) for value in values):
            return torch.as_tensor(np.array(values))
        if not all(isinstance(value, torch.Tensor) for value in values):
            return tuple(values)
        dtypes = {value.dtype for value in values}
        if len(dtypes) == 1 and (per_token or len({value.shape for value in values}) == 1):
            return self._lay_out(values, 0) if per_token else torch.stack(values)
        found = {
            index: f"{str(v.dtype).removeprefix('torch.')} {list(v.shape)}"
            for index, v in zip(indices, values, strict=True)
        }
        raise DataError(
            f"The samples of a microbatch have {key!r} of different kinds, so they cannot be stacked, by sample: "
            f"{found}. Give all the same dtype, and the same shape or one entry for each token."
        )

    def _counts(self, module: str, rows: Rows, seen: range, own: range) -> ModalityCounts:
        given = module in self._plan.loads
        samples, own_samples = _samples_at(seen, rows), _samples_at(own, rows)
        before = len(_samples_at(range(seen.start, own.start), rows))
        inputs = [sample.inputs[module] if given else EncoderInputs(index=-1) for sample in own_samples]
        embeddings = [each.embeddings for each in inputs]
        names = next((each.rows for each in inputs if each.rows), {})
        return ModalityCounts(
            sample_indices=tuple(sample.request.index for sample in samples),
            placeholders=tuple(sample.placeholders[module] for sample in samples),
            samples_per_position=tuple(len(rows[position]) for position in seen),
            own=range(before, before + len(own_samples)),
            items=tuple(each.items for each in inputs),
            embeddings=None if None in embeddings else tuple(each for each in embeddings if each is not None),
            rows={name: tuple(each.rows.get(name, 0) for each in inputs) for name in names},
            per_item={
                name: tuple(row for each in inputs for row in each.per_item.get(name, ()))
                for name in names_for_every_stage(self._expected, module)
            },
        )


def _samples_at(positions: Iterable[int], rows: Rows) -> list[LoadedSample]:
    return [sample for position in positions for sample in rows[position]]


def _check_length(index: int, found: int, told: int) -> None:
    """Compare the length of a loaded sample with what rows were made from."""
    if found != told:
        raise DataError(
            f"Sample {index} has {found} tokens in input_ids (padding by attention_mask not counted), but its length "
            f"was given as {told} by length({index}) or lengths[{index}] of the dataset, from which rows are packed. "
            f"Both must agree in every epoch."
        )


def _check_placeholders(module: str, inputs: EncoderInputs, placeholders: int) -> None:
    """Compare what an encoder declares of its inputs with the placeholders."""
    if inputs.is_declared and inputs.embeddings != placeholders:
        raise DataError(
            f"Sample {inputs.index}: input_ids has {placeholders} placeholder tokens for {module!r}, but its "
            f"{inputs.items} inputs give {inputs.embeddings} embeddings by the encoder's item_sizes. Write "
            f"{inputs.embeddings} placeholder tokens into this sample; if it was cut to a length, cut it elsewhere."
        )


def _length(value: Any) -> int:
    return len(value) if isinstance(value, torch.Tensor) and value.ndim else -1


def _fingerprint_of(module: str, sample: LoadedSample) -> tuple[int, int, int, int, int]:
    """Position, place in the row, index, checksum of the text, and of all else that the module takes of the sample.

    ``sample_check`` compares the former over all ranks, the latter over those of the module.
    """
    text = zlib.crc32(sample.input_ids.contiguous().numpy())
    if module == LANGUAGE:
        assert sample.text is not None
        own = _checksum([sample.text.labels, sample.text.loss_mask, sample.text.position_ids])
    elif module in sample.inputs:
        inputs = sample.inputs[module].arguments
        own = _checksum([value for encoder in sorted(inputs) for _, value in sorted(inputs[encoder].items())])
    else:
        own = NOT_LOADED
    return sample.request.position, sample.request.place, sample.request.index, text, own


def _checksum(values: Sequence[torch.Tensor | Ragged | None]) -> int:
    """Of dtypes, shapes, and some of the bytes: a sum over whole images would cost as much as loading them."""
    checksum = 0
    for value in values:
        for tensor in value if isinstance(value, Ragged) else (value,):
            if tensor is None:
                continue
            content = _bytes_of(tensor)
            step = -(-content.size // _BYTES_OF_A_FINGERPRINT) | 1  # odd, so that it meets every byte of a number
            checksum = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
            checksum = zlib.crc32(np.ascontiguousarray(content[::step]), checksum)
    return checksum


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """uint8 ``[bytes]``. By numpy where it has the dtype, which is several times faster for small tensors."""
    if tensor.dtype in _DTYPES_OF_NUMPY:
        return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()

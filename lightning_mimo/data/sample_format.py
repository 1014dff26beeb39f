"""What a sample may hold, and how it is read: converted where that is exact, refused by name where it is not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lightning_mimo.data.items import ItemSizes
from lightning_mimo.data.tensors import IGNORED, as_tensor, dtype_name, whole_numbers
from lightning_mimo.errors import ConfigError, DataError
from lightning_mimo.microbatch import Microbatch

Sample = Mapping[str, Any]
"""What a dataset returns; see :class:`SampleFormat`."""

Positions = Callable[[int, torch.Tensor, Mapping[str, Any]], torch.Tensor | None]
"""Index of a sample, its tokens int64 ``[S]`` and its modality_inputs -> position_ids; ``None`` for 0, 1, 2, …."""

TEXT_KEYS = ("input_ids", "labels", "loss_mask", "position_ids", "attention_mask")
KEYS = (*TEXT_KEYS, "modality_inputs")


def check_extra_keys(extra_keys: Sequence[str]) -> None:
    """Refuse keys of a user's that have a meaning of their own.

    Raises:
        ConfigError: naming the first of them.
    """
    taken = [key for key in extra_keys if key in Microbatch.__annotations__ or key in KEYS]
    if taken or isinstance(extra_keys, str):
        what = f"holds {taken[0]!r}, which has a meaning of its own" if taken else "is a string"
        raise ConfigError(f"extra_keys={extra_keys!r} {what}. Give a list of other names that your samples have.")


@dataclass(frozen=True, kw_only=True)
class SampleFormat:
    """What samples are read as. A sample is a dict with these keys; others are refused.

    ============================ ============================= =========================================================
    ``input_ids``                whole numbers ``[S]``         tokens, one placeholder for each embedding of an encoder
    ``labels``                   whole numbers ``[S]``         the token to predict; -100 where there is none
    ``loss_mask`` (optional)     numbers ``[S]``, 0 or above   weight of each label; without it all but -100 count
    ``position_ids`` (optional)  whole numbers ``[S], [3, S]`` without them 0, 1, 2, …, or those of ``positions``
    ``attention_mask`` (opt.)    0 or 1, ``[S]``               ones, then zeros: what is padded is cut off
    ``modality_inputs`` (opt.)   nested dict                   ``{module: {encoder: {argument: [items, ...]}}}``
    keys of ``extra_keys``       anything                      reaches ``MimoModule.loss`` in the microbatch
    ============================ ============================= =========================================================

    Tensors, numpy arrays and lists are taken, integers of any width.

    Attributes:
        special_token_ids: encoder module -> its placeholder in ``input_ids``.
        pad_token_id: fills up sequences that are shorter than the longest of their microbatch.
        vocab_size: tokens that the language module knows; ``None`` if unknown.
        max_sequence_length: longest sequence that it takes; ``None`` if unknown.
        position_type: its ``position_embedding_type``; ``None`` if unknown.
        positions: gives a sample its ``position_ids`` where it has none; picklable.
        refused_token_ids: token -> what it stands for and what to do, where the model has no input for it.
        labels_shifted: whether ``labels[t]`` is the token after ``input_ids[t]``; else ``labels[t]`` stands for
            ``input_ids[t]`` itself, as in transformers, and is shifted here, and ``loss_mask`` with it.
        labels_required: whether samples must have labels.
        extra_keys: further keys that every sample has.
        modules: the encoder modules of the layout, names that ``modality_inputs`` may have.
        encoders: module -> encoder -> what it declares; of the modules that this rank builds.
    """

    special_token_ids: Mapping[str, int] = field(default_factory=dict)
    pad_token_id: int = 0
    vocab_size: int | None = None
    max_sequence_length: int | None = None
    position_type: str | None = None
    positions: Positions | None = None
    refused_token_ids: Mapping[int, str] = field(default_factory=dict)
    labels_shifted: bool = True
    labels_required: bool = True
    extra_keys: tuple[str, ...] = ()
    modules: tuple[str, ...] | None = None
    encoders: Mapping[str, Mapping[str, ItemSizes | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, token in self.special_token_ids.items():
            if token == self.pad_token_id:
                raise DataError(
                    f"pad_token_id={token} is also the placeholder of module {name!r}, so padding would ask for "
                    f"embeddings. Choose another pad_token_id in your MimoModule."
                )


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text of one sample, read and checked.

    Attributes:
        input_ids: int64 ``[S]``.
        position_ids: int64 ``[S]`` or ``[3, S]``; ``None`` for 0, 1, 2, ….
        labels: int64 ``[S]``, the token to predict at each position, -100 for none.
        loss_mask: float ``[S]``, 0 where a position counts for nothing.
        extras: further keys -> what the sample has under them.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    labels: torch.Tensor
    loss_mask: torch.Tensor
    extras: Mapping[str, Any]


def check_keys(index: int, sample: object, expected: SampleFormat) -> None:
    """Refuse what is no sample, and keys that would be dropped.

    Raises:
        DataError: naming the sample and the key.
    """
    if not isinstance(sample, Mapping):
        raise DataError(
            f"Sample {index} is a {type(sample).__name__}, but must be a dict with the keys input_ids, labels and, for "
            f"the encoders, modality_inputs."
        )
    if "input_ids" not in sample:
        raise DataError(f"Sample {index} has no 'input_ids'; it has the keys {list(sample)}.")
    unknown = [key for key in sample if key not in KEYS and key not in expected.extra_keys]
    if unknown:
        raise DataError(
            f"Sample {index} has the key {unknown[0]!r}, which nothing would use. Known are {', '.join(KEYS)}. Leave "
            f"it out; or, if your loss() is to see it, declare it: MimoModule(extra_keys=({unknown[0]!r},)); or put it "
            f"under modality_inputs[module][encoder], if it is for an encoder."
        )


def read_ids(index: int, sample: Sample, expected: SampleFormat) -> torch.Tensor:
    """The tokens of a sample, without padding: int64 ``[S]``.

    Raises:
        DataError: naming the sample, the key and the remedy.
    """
    ids = whole_numbers(index, "input_ids", sample["input_ids"])
    length = ids.size(0)
    if length == 0:
        raise DataError(f"Sample {index}: input_ids is empty. A sample has at least one token.")
    if sample.get("attention_mask") is not None:
        ids = ids[: _kept(index, sample, length)]
    if expected.max_sequence_length is not None and ids.size(0) > expected.max_sequence_length:
        raise DataError(
            f"Sample {index}: input_ids has {len(ids)} tokens, but the language module has "
            f"max_sequence_length={expected.max_sequence_length}. Cut the sample in your dataset (placeholders and "
            f"their images together), or give the model a larger max_sequence_length."
        )
    if expected.vocab_size is not None:
        _check_vocabulary(index, "input_ids", ids.numpy(), expected, allowed=expected.special_token_ids.values())
    for token, meaning in expected.refused_token_ids.items():
        if bool((ids == token).any()):
            raise DataError(f"Sample {index}: input_ids has the token {token}, {meaning}")
    return ids


def read_text(index: int, sample: Sample, expected: SampleFormat) -> Text:
    """Everything of a sample but the encoders' inputs.

    Raises:
        DataError: naming the sample, the key and the remedy.
    """
    ids = read_ids(index, sample, expected)
    kept = ids.size(0)
    length = kept if sample.get("attention_mask") is None else len(sample["input_ids"])
    # By numpy: of small arrays, which these are, that is several times faster.
    labels, mask = _labels(index, sample, length, expected)
    labels, mask = labels[:kept], mask[:kept]
    if expected.vocab_size is not None:
        _check_vocabulary(index, "labels", np.where(mask > 0, labels, 0), expected, allowed=())
    if expected.labels_shifted:
        _check_shifted(index, ids.numpy(), labels, mask)
    return Text(
        input_ids=ids,
        position_ids=_positions(index, sample, length, ids, expected),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(mask),
        extras=_extras(index, sample, length, kept, expected),
    )


def _kept(index: int, sample: Sample, length: int) -> int:
    """Tokens that are not padding, from ``attention_mask``."""
    mask = as_tensor(index, "attention_mask", sample["attention_mask"])
    if mask.ndim != 1:
        raise DataError(
            f"Sample {index}: attention_mask has the shape {list(mask.shape)}, but must be [S], ones and then zeros: "
            f"attention is causal over the whole sample. Leave it out."
        )
    _check_length(index, "attention_mask", mask, length)
    kept = int((mask != 0).sum())
    if kept == 0 or not bool((mask[:kept] == 1).all()):
        raise DataError(
            f"Sample {index}: attention_mask is {mask.tolist() if length <= 16 else 'not ones and then zeros'}, but "
            f"attention is causal over the whole sample, so only padding on the right, ones and then zeros, can be "
            f"taken out. Leave attention_mask out and do not pad (padding_side='right', or padding=False)."
        )
    return kept


def _check_length(index: int, key: str, value: torch.Tensor | np.ndarray, length: int) -> None:
    if value.ndim == 0 or value.shape[-1] != length:
        raise DataError(
            f"Sample {index}: {key} has the shape {list(value.shape)}, but input_ids has {length} tokens. Every token "
            f"needs its own entry: cut or pad both alike."
        )


def _check_vocabulary(
    index: int, key: str, ids: np.ndarray, expected: SampleFormat, *, allowed: Collection[int]
) -> None:
    assert expected.vocab_size is not None
    if ids.view(np.uint64).max() < expected.vocab_size:  # where a negative number is a very large one
        return
    outside = ((ids < 0) | (ids >= expected.vocab_size)) & ~np.isin(ids, list(allowed))
    if outside.any():
        place = int(outside.argmax())
        raise DataError(
            f"Sample {index}: {key}[{place}] is {ids[place]}, but the vocabulary has vocab_size="
            f"{expected.vocab_size} tokens, 0 to {expected.vocab_size - 1}. Use the tokenizer that belongs to the "
            f"model, or give the model a larger vocab_size"
            + ("; labels that are not to count are -100." if key == "labels" else ".")
        )


def _labels(index: int, sample: Sample, length: int, expected: SampleFormat) -> tuple[np.ndarray, np.ndarray]:
    """Tokens to predict, and their weights: int64 and float ``[S]``."""
    mask = _mask(index, sample, length)
    if sample.get("labels") is None:
        if expected.labels_required:
            raise DataError(
                f"Sample {index} has no 'labels'; it has the keys {list(sample)}. Give the token to predict at each "
                f"position, -100 where there is none."
            )
        labels = np.full(length, IGNORED)
        mask = np.zeros(length, np.float32) if mask is None else mask
    else:
        labels = whole_numbers(index, "labels", sample["labels"]).numpy()
        _check_length(index, "labels", labels, length)
        counts = labels != IGNORED
        mask = counts.astype(np.float32) if mask is None else mask * counts
    if not expected.labels_shifted:
        labels, mask = np.append(labels[1:], IGNORED), np.append(mask[1:], mask.dtype.type(0))
    return labels, mask


def _mask(index: int, sample: Sample, length: int) -> np.ndarray | None:
    if sample.get("loss_mask") is None:
        return None
    tensor = as_tensor(index, "loss_mask", sample["loss_mask"])
    if tensor.is_complex():
        raise DataError(
            f"Sample {index}: loss_mask has the dtype {dtype_name(tensor.dtype)}, but holds weights, real numbers."
        )
    if tensor.ndim != 1:
        raise DataError(f"Sample {index}: loss_mask has the shape {list(tensor.shape)}, but must be [S], as input_ids.")
    mask = (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()
    _check_length(index, "loss_mask", mask, length)
    if not (mask.min() >= 0 and mask.max() < np.inf):  # neither is true of NaN
        raise DataError(
            f"Sample {index}: loss_mask holds {mask[~((mask >= 0) & np.isfinite(mask))][0]}, but a weight is 0 "
            f"or above. Use 0 where a token is not to count."
        )
    return mask


def _check_shifted(index: int, ids: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> None:
    """Refuse labels that are the tokens themselves, from which a model would learn to copy."""
    counted = mask > 0
    if (counted & (labels != ids)).any() or np.count_nonzero(counted) < 2:
        return
    # A text that repeats one token is its own shifted text.
    if (labels[:-1] == ids[1:])[counted[:-1]].all():
        return
    raise DataError(
        f"Sample {index}: labels are equal to input_ids wherever they count, so the model would learn to copy its "
        f"input. labels[t] must be the token after input_ids[t]; for labels as transformers takes them, which it "
        f"shifts itself, write MimoModule(labels_shifted=False)."
    )


def _positions(
    index: int, sample: Sample, length: int, ids: torch.Tensor, expected: SampleFormat
) -> torch.Tensor | None:
    kind = expected.position_type
    if sample.get("position_ids") is None:
        if expected.positions is not None:
            return expected.positions(index, ids, sample.get("modality_inputs") or {})
        if kind == "mrope":
            _check_text_only(index, ids, expected)
        return None
    positions = whole_numbers(index, "position_ids", sample["position_ids"], dimensions=(1, 2))
    _check_length(index, "position_ids", positions, length)
    if positions.ndim == 2 and positions.size(0) != 3:
        raise DataError(
            f"Sample {index}: position_ids has the shape {list(positions.shape)}, but must be [S] or [3, S] (time, "
            f"height, width). Leave out the batch dimension."
        )
    positions = positions[..., : len(ids)]
    if int(positions.min()) < 0:
        raise DataError(f"Sample {index}: position_ids holds {int(positions.min())}, but a position is 0 or above.")
    plain = positions.ndim == 1 and torch.equal(positions, torch.arange(len(ids)))
    if kind is not None and not plain:
        _check_position_type(index, positions, expected)
    return None if plain else positions


def _check_text_only(index: int, ids: torch.Tensor, expected: SampleFormat) -> None:
    for module, token in expected.special_token_ids.items():
        if bool((ids == token).any()):
            raise DataError(
                f"Sample {index} has placeholders for {module!r}, but no 'position_ids', and the language module has "
                f"positions of three dimensions (mrope). Give position_ids [3, S]: time, height and width of every "
                f"token, as the model's get_rope_index computes them."
            )


def _check_position_type(index: int, positions: torch.Tensor, expected: SampleFormat) -> None:
    kind = expected.position_type
    if positions.ndim == 2 and kind != "mrope":
        raise DataError(
            f"Sample {index}: position_ids has the shape {list(positions.shape)}, but the language module has "
            f"position_embedding_type={kind!r}, which takes one position a token. Give [S], or leave position_ids out."
        )
    if kind not in ("rope", "mrope", "learned_absolute"):
        raise DataError(
            f"Sample {index}: position_ids is not 0, 1, 2, …, but the language module has position_embedding_type="
            f"{kind!r}, which does not look at it. Leave position_ids out."
        )
    if kind == "learned_absolute" and expected.max_sequence_length is not None:
        largest = int(positions.max())
        if largest >= expected.max_sequence_length:
            raise DataError(
                f"Sample {index}: position_ids holds {largest}, but the language module has learned positions up to "
                f"max_sequence_length - 1 = {expected.max_sequence_length - 1}."
            )


def _extras(index: int, sample: Sample, length: int, kept: int, expected: SampleFormat) -> dict[str, Any]:
    missing = [key for key in expected.extra_keys if key not in sample]
    if missing:
        raise DataError(
            f"Sample {index} has no {missing[0]!r}, which MimoModule(extra_keys=...) declares; it has the keys "
            f"{list(sample)}. Every sample must have it."
        )
    extras = {}
    for key in expected.extra_keys:
        value = sample[key]
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            value = as_tensor(index, key, value)
        # One entry for each token: what is padding is cut off, as everywhere.
        is_cut = isinstance(value, torch.Tensor) and value.ndim > 0 and value.size(0) == length > kept
        extras[key] = value[:kept] if is_cut else value
    return extras

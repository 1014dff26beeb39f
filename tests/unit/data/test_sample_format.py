"""Samples as people have them: converted where that is exact, else refused with sample, key and remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mimo.data.sample_format import SampleFormat, check_keys, read_ids, read_text
from lightning_mimo.data.tensors import as_tensor

IMAGE, VOCABULARY = 9, 32
EXPECTED = SampleFormat(special_token_ids={"images": IMAGE}, vocab_size=VOCABULARY, max_sequence_length=8)
INPUT_IDS = [1, 9, 9, 4, 5]
LABELS = [-100, -100, 4, 5, 6]


def sample(**changes: Any) -> dict[str, Any]:
    """A good sample with some keys changed, or left out where they are None."""
    keys = {"input_ids": torch.tensor(INPUT_IDS), "labels": torch.tensor(LABELS), **changes}
    return {key: value for key, value in keys.items() if value is not None}


def expected(**changes: Any) -> SampleFormat:
    return SampleFormat(**{**vars(EXPECTED), **changes})


# Labels and their weights.


def test_labels_of_minus_100_count_for_nothing_without_a_mask() -> None:
    text = read_text(7, sample(), EXPECTED)
    assert text.input_ids.tolist() == INPUT_IDS
    assert text.labels.tolist() == LABELS
    assert text.loss_mask.tolist() == [0, 0, 1, 1, 1]


def test_labels_of_minus_100_count_for_nothing_under_a_mask_of_ones() -> None:
    text = read_text(7, sample(loss_mask=torch.tensor([0, 1, 1, 1, 0])), EXPECTED)
    assert text.loss_mask.tolist() == [0, 0, 1, 1, 0]
    assert text.loss_mask.dtype == torch.float32


def test_weights_keep_their_precision() -> None:
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    assert torch.equal(read_text(7, sample(labels=torch.arange(5), loss_mask=weights), EXPECTED).loss_mask, weights)


def test_labels_as_transformers_takes_them_are_shifted_with_their_mask() -> None:
    mask = [0, 1, 1, 0.5, 1]
    given = sample(labels=torch.tensor([1, -100, -100, 4, 5]), loss_mask=torch.tensor(mask))
    text = read_text(7, given, expected(labels_shifted=False))
    assert text.labels.tolist() == [-100, -100, 4, 5, -100]
    assert text.loss_mask.tolist() == [0, 0, 0.5, 1, 0]


@settings(deadline=None)
@given(st.lists(st.integers(10, 31), min_size=1, max_size=8), st.integers(0, 8))
def test_both_kinds_of_labels_are_read_as_the_same(tokens: list[int], prompt: int) -> None:
    """As transformers shifts: the label of a position is the next position's."""
    ids = torch.tensor(tokens)
    theirs = ids.clone()
    theirs[:prompt] = -100
    ours = torch.cat([theirs[1:], torch.tensor([-100])])
    one = read_text(0, {"input_ids": ids, "labels": theirs}, expected(labels_shifted=False))
    other = read_text(0, {"input_ids": ids, "labels": ours}, EXPECTED)
    assert torch.equal(one.labels, other.labels) and torch.equal(one.loss_mask, other.loss_mask)


def test_labels_that_are_the_input_are_refused_with_the_remedy() -> None:
    given = sample(labels=torch.tensor([-100, -100, -100, 4, 5]))
    with pytest.raises(
        ValueError, match=r"^Sample 7: labels are equal to input_ids .*MimoModule\(labels_shifted=False"
    ):
        read_text(7, given, EXPECTED)


@pytest.mark.parametrize(
    ("ids", "labels"),
    [([4, 5, 5, 5], [5, 5, 5, -100]), ([5, 5, 5], [5, 5, 5]), ([4, 5, 6], [-100, 5, -100])],
    ids=["a repeated token, shifted", "nothing but one token", "one label, by chance"],
)
def test_labels_that_may_be_right_are_taken(ids: list[int], labels: list[int]) -> None:
    read_text(7, {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}, EXPECTED)


def test_labels_may_be_missing_where_none_are_needed_only() -> None:
    text = read_text(7, sample(labels=None), expected(labels_required=False))
    assert (text.labels.tolist(), text.loss_mask.tolist()) == ([-100] * 5, [0] * 5)
    with pytest.raises(ValueError, match=r"^Sample 7 has no 'labels'; it has the keys \['input_ids'\]"):
        read_text(7, sample(labels=None), EXPECTED)


@pytest.mark.parametrize("key", ["labels", "loss_mask", "position_ids", "attention_mask"])
@pytest.mark.parametrize("length", [3, 6])
def test_another_length_than_that_of_the_tokens_is_refused(key: str, length: int) -> None:
    with pytest.raises(ValueError, match=rf"^Sample 7: {key} has the shape \[{length}\], but input_ids has 5 tokens"):
        read_text(7, sample(**{key: torch.ones(length, dtype=torch.int64)}), EXPECTED)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_weights_below_0_and_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^Sample 7: loss_mask holds {value}, but a weight is 0 or above"):
        read_text(7, sample(loss_mask=torch.tensor([0, 0, value, 1, 1])), EXPECTED)


# Tokens.


@pytest.mark.parametrize("key", ["input_ids", "labels"])
@pytest.mark.parametrize("token", [-1, 32, 10**6])
def test_token_outside_of_the_vocabulary_is_refused(key: str, token: int) -> None:
    given = sample()
    given[key] = given[key].clone()
    given[key][3] = token
    message = rf"^Sample 7: {key}\[3\] is {token}, but the vocabulary has vocab_size=32 tokens, 0 to 31"
    with pytest.raises(ValueError, match=message):
        read_text(7, given, EXPECTED)


def test_label_outside_of_the_vocabulary_may_stand_where_it_does_not_count() -> None:
    read_text(7, sample(labels=torch.tensor([99, 99, 4, 5, 6]), loss_mask=torch.tensor([0, 0, 1, 1, 1])), EXPECTED)


def test_placeholder_outside_of_the_vocabulary_is_taken() -> None:
    layout = expected(special_token_ids={"images": -200})
    assert read_ids(7, sample(input_ids=torch.tensor([1, -200, 3])), layout).tolist() == [1, -200, 3]


def test_too_long_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Sample 7: input_ids has 9 tokens, but .*max_sequence_length=8\. Cut the"):
        read_ids(7, {"input_ids": torch.arange(9)}, EXPECTED)


def test_empty_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Sample 7: input_ids is empty"):
        read_ids(7, {"input_ids": torch.zeros(0, dtype=torch.int64)}, EXPECTED)


@pytest.mark.parametrize(
    "kind",
    [list, tuple, np.array, np.int32, np.uint8, torch.tensor, torch.int32, torch.int16, torch.uint8],
    ids=lambda kind: getattr(kind, "__name__", str(kind)),
)
def test_whole_numbers_of_any_kind_are_taken(kind: Any) -> None:
    if isinstance(kind, torch.dtype):
        ids = torch.tensor(INPUT_IDS, dtype=kind)
    elif kind in (np.int32, np.uint8):
        ids = np.array(INPUT_IDS, dtype=kind)
    else:
        ids = kind(INPUT_IDS)
    text = read_text(7, sample(input_ids=ids), EXPECTED)
    assert text.input_ids.dtype == torch.int64
    assert text.input_ids.tolist() == INPUT_IDS


def test_an_array_that_cannot_be_written_to_is_taken() -> None:
    ids = np.array(INPUT_IDS)
    ids.setflags(write=False)
    assert read_ids(7, {"input_ids": ids}, EXPECTED).tolist() == INPUT_IDS


@pytest.mark.parametrize("key", ["input_ids", "labels", "position_ids"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bool])
def test_other_dtypes_are_refused(key: str, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"^Sample 7: {key} has the dtype {name}, .*dtype=torch\.int64\)"):
        read_text(7, sample(**{key: torch.ones(5, dtype=dtype)}), EXPECTED)


def test_minus_100_that_became_156_is_refused() -> None:
    labels = torch.tensor([-100, -100, 4, 5, 6]).to(torch.uint8)
    with pytest.raises(ValueError, match=r"^Sample 7: labels has the dtype uint8, .* and 156, which -100 becomes"):
        read_text(7, sample(labels=labels), EXPECTED)


@pytest.mark.parametrize("value", ["text", 5, None, [1, "a"], [[1], [2, 3]], np.array(["a"])], ids=repr)
def test_what_is_no_list_of_numbers_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^Sample 7: input_ids is an? .* that is no rectangular array of numbers"):
        read_ids(7, {"input_ids": value}, EXPECTED)


@pytest.mark.parametrize(
    "array",
    [
        np.array(INPUT_IDS, ">i4"),
        np.array(INPUT_IDS[::-1])[::-1],
        tuple(INPUT_IDS),
        [np.int64(token) for token in INPUT_IDS],
    ],
    ids=["byte_order", "reversed", "tuple", "numpy_numbers"],
)
def test_arrays_in_any_order_of_bytes_and_elements_are_taken(array: Any) -> None:
    assert read_ids(7, sample(input_ids=array), EXPECTED).tolist() == INPUT_IDS


def test_floats_of_a_list_are_float32_as_in_torch() -> None:
    assert as_tensor(7, "x", [[0.5, 1.0]]).dtype == torch.float32
    assert as_tensor(7, "x", np.ones((1, 2))).dtype == torch.float64


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.ones(5).to_sparse(), "sparse"),
        (torch.empty(5, device="meta"), "meta"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "nested"),
    ],
    ids=["sparse", "meta", "nested"],
)
def test_tensor_that_is_not_dense_on_the_cpu_is_refused(tensor: torch.Tensor, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"Sample 7: loss_mask is a {kind} tensor, but workers collate dense"):
        read_text(7, sample(loss_mask=tensor), EXPECTED)


def test_complex_weights_and_masks_of_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Sample 7: loss_mask has the dtype complex64, but holds weights, real"):
        read_text(7, sample(loss_mask=np.ones(5, np.complex64)), EXPECTED)
    with pytest.raises(ValueError, match=r"Sample 7: attention_mask has the shape \[5, 5\], but must be \[S\]"):
        read_text(7, sample(attention_mask=torch.ones(5, 5)), EXPECTED)


def test_batch_dimension_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"^Sample 7: input_ids has the shape \[1, 5\], .*Take input_ids\[0\]"):
        read_ids(7, sample(input_ids=torch.tensor([INPUT_IDS])), EXPECTED)


# Padding.


def test_padding_on_the_right_is_cut_off() -> None:
    given = sample(
        attention_mask=[1, 1, 1, 1, 0], position_ids=torch.tensor([3, 4, 5, 6, 0]), numbers=torch.arange(5), name="a"
    )
    text = read_text(7, given, expected(extra_keys=("numbers", "name"), position_type="rope"))
    assert text.input_ids.tolist() == INPUT_IDS[:4]
    assert text.labels.tolist() == LABELS[:4]
    assert text.loss_mask.tolist() == [0, 0, 1, 1]
    assert text.position_ids is not None and text.position_ids.tolist() == [3, 4, 5, 6]
    assert text.extras["numbers"].tolist() == [0, 1, 2, 3] and text.extras["name"] == "a"


def test_attention_mask_of_ones_changes_nothing() -> None:
    assert read_ids(7, sample(attention_mask=torch.ones(5)), EXPECTED).tolist() == INPUT_IDS


@pytest.mark.parametrize("mask", [[0, 1, 1, 1, 1], [1, 0, 1, 1, 1], [0] * 5, [1, 1, 2, 1, 1], [-1e9, 0, 0, 0, 0]])
def test_other_attention_masks_are_refused(mask: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^Sample 7: attention_mask is \[.*\], but .* only padding on the right"):
        read_ids(7, sample(attention_mask=mask), EXPECTED)


# Positions.


@pytest.mark.parametrize("kind", ["rope", "mrope", "learned_absolute", None])
def test_one_position_for_each_token(kind: str | None) -> None:
    given = sample(input_ids=torch.tensor([1, 2, 3, 4, 5]), position_ids=[0, 1, 2, 0, 1])
    positions = read_text(7, given, expected(position_type=kind)).position_ids
    assert positions is not None and positions.tolist() == [0, 1, 2, 0, 1]


def test_positions_in_space_are_for_a_model_that_has_them() -> None:
    given = sample(position_ids=torch.arange(15).view(3, 5))
    positions = read_text(7, given, expected(position_type="mrope")).position_ids
    assert positions is not None and positions.shape == (3, 5)
    with pytest.raises(ValueError, match=r"^Sample 7: position_ids has the shape \[3, 5\], .*'rope', which takes one"):
        read_text(7, given, expected(position_type="rope"))


def test_images_need_positions_in_a_model_with_positions_in_space() -> None:
    with pytest.raises(ValueError, match=r"^Sample 7 has placeholders for 'images', but no 'position_ids'.*mrope"):
        read_text(7, sample(), expected(position_type="mrope"))
    text = sample(input_ids=torch.tensor([1, 2, 3, 4, 5]))
    assert read_text(7, text, expected(position_type="mrope")).position_ids is None


def test_usual_positions_are_no_others() -> None:
    assert read_text(7, sample(position_ids=np.arange(5)), expected(position_type="none")).position_ids is None


@pytest.mark.parametrize(
    ("positions", "kind", "message"),
    [
        ([0, 1, 2, 3, 9], "none", r"position_embedding_type='none', which does not look at it\. Leave"),
        ([0, 1, 2, 3, 8], "learned_absolute", r"holds 8, but .*learned positions up to max_sequence_length - 1 = 7"),
        ([0, 1, 2, 3, -1], "rope", r"holds -1, but a position is 0 or above"),
        ([[0, 1, 2, 3, 4]], "rope", r"has the shape \[1, 5\], but must be \[S\] or \[3, S\]"),
    ],
)
def test_positions_that_would_not_be_used_are_refused(positions: list[Any], kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^Sample 7: position_ids .*" + message):
        read_text(7, sample(position_ids=positions), expected(position_type=kind))


# Keys.


@pytest.mark.parametrize("key", ["token_type_ids", "pixel_values", "Labels"])
def test_unknown_key_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^Sample 7 has the key '{key}', .*extra_keys=\('{key}',\)"):
        check_keys(7, sample(**{key: 1}), EXPECTED)
    check_keys(7, sample(**{key: 1}), expected(extra_keys=(key,)))


@pytest.mark.parametrize(
    ("value", "message"),
    [((1, 2), "^Sample 7 is a tuple, but must be a dict"), ({"ids": 1}, r"^Sample 7 has no 'input_ids'.*\['ids'\]")],
)
def test_what_is_no_sample_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_keys(7, value, EXPECTED)


def test_declared_key_must_be_there() -> None:
    with pytest.raises(ValueError, match=r"^Sample 7 has no 'weight', which MimoModule\(extra_keys=\.\.\.\) declares"):
        read_text(7, sample(), expected(extra_keys=("weight",)))

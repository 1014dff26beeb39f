"""The check of placeholders against embeddings: it names the sample, the module and both numbers."""

from __future__ import annotations

import pytest

from lightning_mimo.microbatch import ModalityCounts


def counts(
    *, placeholders: tuple[int, ...], items: tuple[int, ...], own: range | None = None, first: int = 100
) -> ModalityCounts:
    return ModalityCounts(
        sample_indices=tuple(range(first, first + len(placeholders))),
        placeholders=placeholders,
        own=range(len(placeholders)) if own is None else own,
        items=items,
    )


@pytest.mark.parametrize(
    ("placeholders", "items", "rows"),
    [
        pytest.param((4, 4), (1, 1), 8, id="one-image-each"),
        pytest.param((0, 8, 4), (0, 2, 1), 12, id="different-numbers-of-images"),
        pytest.param((0, 0), (0, 0), 0, id="no-image-at-all"),
    ],
)
def test_rows_that_agree_pass(placeholders, items, rows):
    counts(placeholders=placeholders, items=items).check_rows("images", rows, uniform=True)


@pytest.mark.parametrize("placeholders", [(3, 4), (3, 5)], ids=["odd-sum", "sum-that-divides"])
def test_clips_of_different_lengths_are_checked_by_their_sum(placeholders):
    counts(placeholders=placeholders, items=(1, 1)).check_rows("audio", sum(placeholders), uniform=False)


def test_only_the_encoders_own_samples_are_checked():
    both = counts(placeholders=(99, 4, 8, 99), items=(1, 2), own=range(1, 3))
    assert both.own_placeholders == (4, 8)
    both.check_rows("images", 12, uniform=True)


def test_sample_with_too_many_placeholders_is_named():
    message = (
        r"^Sample 101: input_ids has 5 placeholder tokens for 'images', but its 1 inputs give 4 embeddings "
        r"\(4 each\)\. Write 4 placeholder tokens into this sample, or give it as many inputs as it has "
        r"placeholders for\.$"
    )
    with pytest.raises(ValueError, match=message):
        counts(placeholders=(4, 5, 4), items=(1, 1, 1)).check_rows("images", 12, uniform=True)


def test_numbers_that_agree_in_sum_but_not_by_sample_are_found():
    message = r"^Sample 100: input_ids has 8 placeholder tokens for 'images', but its 1 inputs give 4 embeddings"
    with pytest.raises(ValueError, match=message):
        counts(placeholders=(8, 4), items=(1, 2)).check_rows("images", 12, uniform=True)


def test_sample_of_a_shard_is_named_by_its_index_in_the_dataset():
    with pytest.raises(ValueError, match=r"^Sample 103: input_ids has 2 placeholder tokens for 'audio'"):
        counts(placeholders=(9, 9, 4, 2), items=(1, 1), own=range(2, 4)).check_rows("audio", 8, uniform=True)


def test_placeholders_without_any_input_are_found():
    message = r"^Sample 101: input_ids has 4 placeholder tokens for 'images', but its 0 inputs give 0 embeddings"
    with pytest.raises(ValueError, match=message):
        counts(placeholders=(0, 4), items=(0, 0)).check_rows("images", 0, uniform=True)


def test_uneven_rows_name_all_samples_and_both_sums():
    message = r"Samples \[100, 101\]: input_ids has 6 placeholder tokens for 'audio', but the encoder made 7 embeddings"
    with pytest.raises(ValueError, match=message):
        counts(placeholders=(3, 3), items=(1, 1)).check_rows("audio", 7, uniform=True)


def test_counts_survive_a_move_to_another_device():
    moved = counts(placeholders=(1,), items=(1,))
    assert moved.to("cuda", non_blocking=True) is moved

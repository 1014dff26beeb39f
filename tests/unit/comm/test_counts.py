"""The check of placeholders against embeddings: it names the sample, the module and both numbers."""

from __future__ import annotations

import pytest

from lightning_mimo.microbatch import ModalityCounts


def counts(
    *,
    placeholders: tuple[int, ...],
    items: tuple[int, ...],
    embeddings: tuple[int, ...] | None = None,
    own: range | None = None,
    first: int = 100,
) -> ModalityCounts:
    return ModalityCounts(
        sample_indices=tuple(range(first, first + len(placeholders))),
        placeholders=placeholders,
        samples_per_position=(1,) * len(placeholders),
        own=range(len(placeholders)) if own is None else own,
        items=items,
        embeddings=embeddings,
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


def test_rows_of_undeclared_items_are_refused() -> None:
    message = (
        r"^Module 'audio': the encoder returned 7 rows for 2 items, \[rows, hidden\], .* Return \[items, tokens, "
        r"hidden\]; or declare .*ItemSizes"
    )
    with pytest.raises(ValueError, match=message):
        counts(placeholders=(3, 4), items=(1, 1)).check_rows("audio", 7, uniform=False)


def test_one_row_for_each_item_needs_no_declaration() -> None:
    counts(placeholders=(2, 1), items=(2, 1)).check_rows("audio", 3, uniform=False)
    with pytest.raises(
        ValueError, match=r"^Sample 100: .* 1 placeholder tokens .* 2 inputs give 2 embeddings \(1 each"
    ):
        counts(placeholders=(1, 2), items=(2, 1)).check_rows("audio", 3, uniform=False)


def test_declared_rows_are_checked_by_sample() -> None:
    declared = counts(placeholders=(3, 4), items=(1, 1), embeddings=(3, 4))
    declared.check_rows("audio", 7, uniform=False)
    with pytest.raises(ValueError, match=r"^Sample 100: .* 3 placeholder tokens .* its 1 inputs give 4 embeddings\."):
        counts(placeholders=(3, 4), items=(1, 1), embeddings=(4, 3)).check_rows("audio", 7, uniform=False)


def test_encoder_that_does_not_keep_to_its_declaration_is_named() -> None:
    message = r"Samples \[100, 101\]: the encoder of 'audio' made 6 embeddings, but .* declared to give 3 \+ 4 = 7"
    with pytest.raises(ValueError, match=message):
        counts(placeholders=(3, 4), items=(1, 1), embeddings=(3, 4)).check_rows("audio", 6, uniform=False)


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


def test_counts_survive_a_move_to_another_device():
    moved = counts(placeholders=(1,), items=(1,))
    assert moved.to("cuda", non_blocking=True) is moved

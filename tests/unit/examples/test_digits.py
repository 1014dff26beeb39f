"""The digits demo's data and drawings."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch.utils.data import RandomSampler, SequentialSampler

from examples.digits import terminal
from examples.digits.data import (
    VOCAB_SIZE,
    DigitsData,
    DigitsDataset,
    Token,
    answer_tokens,
    decode_answer,
    normalise,
    sequence_length,
    shift_images,
    split_scans,
)

POOL = 50
PAD, BOS, EOS, IMAGE, READ, SUM, MAX = Token
QUESTIONS = [READ, SUM, MAX]


class Untouchable:
    """A pool of images that must not be looked at."""

    def __len__(self) -> int:
        return POOL

    def __getitem__(self, index: object) -> np.ndarray:
        raise AssertionError("an image was touched")


def random_images(count: int = POOL) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 17, size=(count, 8, 8)).astype(np.float32)


def make_dataset(
    *,
    images: np.ndarray | Untouchable | None = None,
    targets: np.ndarray | None = None,
    length: int = 40,
    seed: int = 3,
    max_images: int = 2,
    augment: bool = False,
    swap_images: bool = False,
) -> DigitsDataset:
    return DigitsDataset(
        random_images() if images is None else images,
        np.arange(POOL) % 10 if targets is None else targets,
        length=length,
        seed=seed,
        max_images=max_images,
        augment=augment,
        swap_images=swap_images,
    )


def pixel_values(sample: dict) -> torch.Tensor:
    return sample["modality_inputs"]["images"]["vit"]["pixel_values"]


def prompt_of(sample: dict) -> tuple[int, Token]:
    """Return the number of images and the question, read off the text."""
    ids = sample["input_ids"].tolist()
    count = ids.count(IMAGE)
    return count, Token(ids[1 + count])


def find(dataset: DigitsDataset, count: int, question: Token) -> dict:
    return next(sample for sample in dataset if prompt_of(sample) == (count, question))


@pytest.fixture(scope="module")
def data() -> DigitsData:
    module = DigitsData(global_batch_size=8, train_samples=300, val_samples=100)
    module.prepare_data()
    module.setup("fit")
    return module


# --- the text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "question", "input_ids", "labels", "loss_mask"),
    [
        (1, READ, [BOS, IMAGE, READ, 8, PAD, PAD], [IMAGE, READ, 8, EOS, PAD, PAD], [0, 0, 1, 1, 0, 0]),
        (1, SUM, [BOS, IMAGE, SUM, 8, PAD, PAD], [IMAGE, SUM, 8, EOS, PAD, PAD], [0, 0, 1, 1, 0, 0]),
        (2, READ, [BOS, IMAGE, IMAGE, READ, 8, 8], [IMAGE, IMAGE, READ, 8, 8, EOS], [0, 0, 0, 1, 1, 1]),
        (2, SUM, [BOS, IMAGE, IMAGE, SUM, 1, 6], [IMAGE, IMAGE, SUM, 1, 6, EOS], [0, 0, 0, 1, 1, 1]),
        (2, MAX, [BOS, IMAGE, IMAGE, MAX, 8, PAD], [IMAGE, IMAGE, MAX, 8, EOS, PAD], [0, 0, 0, 1, 1, 0]),
    ],
    ids=lambda value: value.name if isinstance(value, Token) else None,
)
def test_text_by_hand(count, question, input_ids, labels, loss_mask):
    sample = find(make_dataset(targets=np.full(POOL, 8)), count, question)

    assert sample["input_ids"].tolist() == input_ids
    assert sample["labels"].tolist() == labels
    assert sample["loss_mask"].tolist() == loss_mask


@pytest.mark.parametrize(
    ("question", "digits", "answer"),
    [
        (READ, [7, 0, 7], [7, 0, 7]),
        (SUM, [0], [0]),
        (SUM, [4, 5], [9]),
        (SUM, [9, 9], [1, 8]),
        (SUM, [9] * 12, [1, 0, 8]),
        (MAX, [3, 9, 1], [9]),
    ],
)
def test_answers(question, digits, answer):
    assert answer_tokens(question, digits) == answer


@pytest.mark.parametrize(("max_images", "expected"), [(1, 4), (2, 6), (3, 8)])
def test_every_sample_has_the_same_length_and_keeps_its_whole_answer(max_images, expected):
    assert sequence_length(max_images) == expected
    for sample in make_dataset(targets=np.full(POOL, 9), max_images=max_images):
        assert {len(sample[name]) for name in ("input_ids", "labels", "loss_mask")} == {expected}
        assert sample["labels"][sample["loss_mask"].bool()][-1] == EOS
        assert EOS not in sample["input_ids"]


def test_shapes_and_dtypes():
    sample = find(make_dataset(augment=True), 2, READ)

    assert set(sample) == {"input_ids", "labels", "loss_mask", "modality_inputs"}
    assert sample["input_ids"].dtype == sample["labels"].dtype == torch.int64
    assert sample["loss_mask"].dtype == torch.float32
    assert pixel_values(sample).shape == (2, 1, 8, 8)
    assert pixel_values(sample).dtype == torch.float32


def test_answers_are_about_the_images_shown():
    # An image that is its own label: the pixel value is the digit.
    targets = np.arange(POOL) % 10
    images = np.broadcast_to(targets[:, None, None], (POOL, 8, 8)).astype(np.float32)
    for sample in make_dataset(targets=targets, images=images):
        digits = (pixel_values(sample)[:, 0, 0, 0] * 0.38 + 0.3).mul(16).round().int().tolist()
        count, question = prompt_of(sample)
        assert len(digits) == count
        answer = sample["labels"][sample["loss_mask"].bool()].tolist()
        assert answer == [*answer_tokens(question, digits), EOS]


def test_counts_and_questions_are_drawn_uniformly():
    dataset = make_dataset(length=1200)
    prompts = [prompt_of(dataset.load(index, {"language"})) for index in range(len(dataset))]

    for prompt in [(count, question) for count in (1, 2) for question in QUESTIONS]:
        assert 150 < prompts.count(prompt) < 250


def test_token_ids_fit_the_vocabulary():
    assert all(9 < token < VOCAB_SIZE for token in Token)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [([1, 2, EOS, 5], "12"), ([EOS], ""), ([7], "7"), ([IMAGE, 3], "<IMAGE>3"), ([31, EOS], "<31>")],
)
def test_decode_answer(tokens, text):
    assert decode_answer(tokens) == text
    assert decode_answer(torch.tensor(tokens)) == text


# --- what a sample depends on -------------------------------------------------------------------------------


@pytest.mark.parametrize("swap_images", [False, True])
def test_a_sample_depends_on_seed_and_index_only(swap_images):
    forwards, backwards = (make_dataset(augment=True, swap_images=swap_images) for _ in range(2))
    first = [forwards[index] for index in range(len(forwards))]
    second = [backwards[index] for index in reversed(range(len(backwards)))][::-1]

    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["labels"], other["labels"])
        assert torch.equal(pixel_values(one), pixel_values(other))


def test_another_seed_gives_other_samples():
    one, other = make_dataset(), make_dataset(seed=4)
    same = sum(torch.equal(pixel_values(a), pixel_values(b)) for a, b in zip(one, other, strict=True))

    assert same < 5


def test_load_without_images_touches_no_image():
    dataset, blind = make_dataset(), make_dataset(images=Untouchable())
    sample = blind.load(5, {"language"})

    assert sample["modality_inputs"] == {}
    assert torch.equal(sample["input_ids"], dataset[5]["input_ids"])
    with pytest.raises(AssertionError, match="an image was touched"):
        blind.load(5, {"images"})


def test_swap_images_keeps_the_text_and_changes_the_images():
    straight, swapped = make_dataset(), make_dataset(swap_images=True)

    changed = 0
    for index in range(len(straight)):
        own, other = straight[index], swapped[index]
        assert all(torch.equal(own[name], other[name]) for name in ("input_ids", "labels", "loss_mask"))
        assert pixel_values(own).shape == pixel_values(other).shape
        changed += not torch.equal(pixel_values(own), pixel_values(other))
        # As many as both samples have are those of the sample before; index -1 is the last sample.
        before = pixel_values(straight[index - 1 if index else len(straight) - 1])
        common = min(len(before), len(pixel_values(other)))
        assert torch.equal(pixel_values(other)[:common], before[:common])
    # In so small a pool, neighbours draw the same image now and then.
    assert changed > 35


@pytest.mark.parametrize("swap_images", [False, True])
def test_describe_agrees_with_the_sample(swap_images):
    dataset = make_dataset(swap_images=swap_images)
    for index, sample in enumerate(dataset):
        images, question, answer = dataset.describe(index)
        assert torch.equal(torch.from_numpy(normalise(images)), pixel_values(sample)[:, 0])
        assert question == prompt_of(sample)[1].name
        assert answer == decode_answer(sample["labels"][sample["loss_mask"].bool()])


@pytest.mark.parametrize("index", [-1, 40])
def test_an_index_outside_is_refused(index):
    with pytest.raises(IndexError, match=f"sample {index} of a DigitsDataset of 40"):
        make_dataset()[index]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": np.zeros(3, dtype=int)}, "50 images but 3 targets"),
        ({"max_images": 0}, "max_images=0: a sample has at least one image"),
        ({"swap_images": True, "length": 1}, "another sample to swap, got length=1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(**changes)


# --- augmentation -------------------------------------------------------------------------------------------


def test_a_shift_moves_ink_and_keeps_its_amount():
    images = np.zeros((2, 8, 8), dtype=np.float32)
    images[:, 2:6, 2:6] = random_images(2)[:, 2:6, 2:6]
    shifts = np.array([[0.5, -0.25], [-0.4, 0.3]])
    shifted = shift_images(images, shifts)

    ink = images.sum((1, 2))
    np.testing.assert_allclose(shifted.sum((1, 2)), ink, rtol=1e-5)
    for axis in (1, 2):
        where = np.arange(8)[:, None] if axis == 1 else np.arange(8)
        moved = (shifted * where).sum((1, 2)) / ink - (images * where).sum((1, 2)) / ink
        np.testing.assert_allclose(moved, shifts[:, axis - 1], atol=1e-5)


def test_a_shift_by_half_a_pixel_by_hand():
    image = np.zeros((1, 8, 8), dtype=np.float32)
    image[0, 3, 3] = 16
    expected = np.zeros((8, 8))
    expected[3:5, 3] = 8

    np.testing.assert_array_equal(shift_images(image, np.array([[0.5, 0.0]]))[0], expected)


def test_no_shift_changes_nothing():
    np.testing.assert_array_equal(shift_images(random_images(3), np.zeros((3, 2))), random_images(3))


def test_augmentation_shifts_the_same_images_under_the_same_text():
    for plain, augmented in zip(make_dataset(), make_dataset(augment=True), strict=True):
        assert torch.equal(plain["labels"], augmented["labels"])
        assert not torch.equal(pixel_values(plain), pixel_values(augmented))


# --- the data module ----------------------------------------------------------------------------------------


def test_held_out_images_are_never_trained_on(data):
    train, held_out = split_scans(1797, seed=1)
    assert (len(train), len(held_out)) == (1438, 359)
    assert sorted([*train, *held_out]) == list(range(1797))

    # No two of the scans are alike, so their bytes tell them apart.
    pools = [{scan.tobytes() for scan in pool.images} for pool in (data.train_set, data.held_out_set)]
    assert [len(pool) for pool in pools] == [1438, 359]
    assert pools[0].isdisjoint(pools[1])


def test_the_seed_decides_the_split():
    np.testing.assert_array_equal(split_scans(100, seed=1)[1], split_scans(100, seed=1)[1])
    assert set(split_scans(100, seed=1)[1]) != set(split_scans(100, seed=2)[1])


def test_loaders_are_those_of_one_process(data):
    train = data.train_dataloader()
    assert (train.dataset, train.batch_size) == (data.train_set, 8)
    assert isinstance(train.sampler, RandomSampler)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert (loader.dataset, loader.batch_size) == (data.held_out_set, 8)
        assert isinstance(loader.sampler, SequentialSampler)


def test_only_training_images_are_augmented(data):
    assert data.train_set.augment
    assert not data.held_out_set.augment


def test_swap_images_leaves_training_alone():
    data = DigitsData(swap_images=True)
    data.setup("fit")

    assert not data.train_set.swap_images
    assert data.held_out_set.swap_images


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_setup_builds_what_the_stage_needs(stage):
    data = DigitsData()
    data.setup(stage)

    assert len(data.held_out_set) == 1024
    assert not hasattr(data, "train_set")


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install lightning-mimo\[digits\]"):
        DigitsData().prepare_data()


# --- the drawings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_drawing_has_eight_equal_rows(count):
    lines = terminal.draw(random_images(count)).split("\n")

    assert len(lines) == 8
    assert {len(line) for line in lines} == {16 * count + 3 * (count - 1)}


def test_ink_is_dark_and_paper_is_blank():
    image = np.zeros((1, 8, 8), dtype=np.float32)
    image[0, 0, :5] = [0, 4, 8, 12, 16]
    first, *others = terminal.draw(image).split("\n")

    assert first == "  ░░▒▒▓▓██      "
    assert set("".join(others)) == {" "}


@pytest.mark.parametrize(("answer", "verdict"), [("12", "right"), ("2", "WRONG"), ("", "WRONG")])
def test_show_sample_says_whether_the_model_is_right(answer, verdict):
    lines = terminal.show_sample(random_images(2), "SUM", answer, "12").split("\n")

    assert len(lines) == 9
    assert lines[-1].split() == ["question:", "SUM", "model:", answer or "-", "truth:", "12", verdict]

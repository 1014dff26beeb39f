"""The data of the digits demo with sound."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.digits_avlm.data import SEQUENCE_LENGTH, Token, TonesData, TonesDataset, answer_tokens
from examples.digits_avlm.tones import BINS, FRAME, FRAMES, FREQUENCIES, SAMPLE_RATE, picture, spectrum, tone

POOL = 50
TARGETS = np.arange(POOL) % 10
# An image that is its own label: every pixel has the value of the digit.
IMAGES = np.broadcast_to(TARGETS[:, None, None], (POOL, 8, 8)).astype(np.float32)


class Untouchable:
    """A pool of images that must not be looked at."""

    def __len__(self) -> int:
        return POOL

    def __getitem__(self, index: object) -> np.ndarray:
        raise AssertionError("an image was touched")


def dataset(images: np.ndarray | Untouchable = IMAGES, **options: object) -> TonesDataset:
    return TonesDataset(images, TARGETS, **{"length": 60, "seed": 3, **options})


def pixels(sample: dict) -> torch.Tensor:
    return sample["modality_inputs"]["images"]["vit"]["pixel_values"]


def features(sample: dict) -> torch.Tensor:
    return sample["modality_inputs"]["audio"]["clips"]["features"]


def digits_shown(sample: dict) -> list[int]:
    return (pixels(sample)[:, 0, 0, 0] * 0.38 + 0.3).mul(16).round().int().tolist()


def keys_sounded(sample: dict) -> list[int]:
    """Which keys a person with a tuner would find: the loudest bin of the rows' band and of the columns' band."""
    hertz = (np.arange(BINS) + 20) * SAMPLE_RATE / FRAME
    loudest = features(sample).numpy().max(axis=1)
    low, high = (hertz[band][loudest[:, band].argmax(axis=1)] for band in (hertz < 1060, hertz > 1100))
    return [
        min(FREQUENCIES, key=lambda key: abs(FREQUENCIES[key][0] - a) + abs(FREQUENCIES[key][1] - b))
        for a, b in zip(low, high, strict=True)
    ]


@pytest.mark.parametrize(
    ("question", "answer"), [("READ", [7, 0]), ("HEAR", [9]), ("BOTH", [7, 0, 9]), ("MAX", [9])], ids=str
)
def test_answers(question: str, answer: list[int]) -> None:
    assert answer_tokens(Token[question], [7, 0], [9]) == answer


def test_answers_are_about_what_is_shown_and_sounded() -> None:
    right = 0
    for sample in dataset():
        text = sample["input_ids"].tolist()
        question = Token(text[1 + text.count(Token.IMAGE) + text.count(Token.CLIP)])
        seen, heard = digits_shown(sample), keys_sounded(sample)
        assert (len(seen), len(heard)) == (text.count(Token.IMAGE), text.count(Token.CLIP))
        answer = sample["labels"][sample["loss_mask"].bool()].tolist()
        right += answer == [*answer_tokens(question, seen, heard), Token.EOS]
    # The tuner is not as good as a model: it mistakes a key now and then.
    assert right >= 54


def test_every_sample_has_the_same_length_and_all_questions_come_up() -> None:
    samples = list(dataset())
    assert {len(sample[name]) for sample in samples for name in ("input_ids", "labels", "loss_mask")} == {
        SEQUENCE_LENGTH
    }
    asked = {int(token) for sample in samples for token in sample["input_ids"] if token >= Token.READ}
    assert asked == {Token.READ, Token.HEAR, Token.BOTH, Token.MAX}
    assert not any(Token.EOS in sample["input_ids"] for sample in samples)


def test_a_sample_depends_on_seed_and_index_only() -> None:
    one, two, other = dataset(augment=True), dataset(augment=True), dataset(seed=4)
    for index in reversed(range(20)):
        whole, part = one[index], two.load(index, {"audio"})
        assert torch.equal(features(whole), features(part))
        assert torch.equal(pixels(whole), pixels(two[index]))
    assert not all(torch.equal(one[i]["input_ids"], other[i]["input_ids"]) for i in range(20))


def test_a_rank_loads_only_what_its_modules_need() -> None:
    untouchable = dataset(Untouchable())
    assert untouchable.load(0, {"language"})["modality_inputs"] == {}
    assert set(untouchable.load(0, {"audio", "language"})["modality_inputs"]) == {"audio"}
    assert set(dataset().load(0, {"images"})["modality_inputs"]) == {"images"}


@pytest.mark.parametrize("swapped", ["images", "sounds"])
def test_swapping_leaves_the_text_and_the_numbers_of_items(swapped: str) -> None:
    plain, other = dataset(), dataset(**{f"swap_{swapped}": True})
    changed = 0
    for index in range(len(plain)):
        a, b = plain[index], other[index]
        assert all(torch.equal(a[name], b[name]) for name in ("input_ids", "labels", "loss_mask"))
        assert pixels(a).shape == pixels(b).shape and features(a).shape == features(b).shape
        assert torch.equal(pixels(a), pixels(b)) or swapped == "images"
        assert torch.equal(features(a), features(b)) or swapped == "sounds"
        changed += not (torch.equal(pixels(a), pixels(b)) and torch.equal(features(a), features(b)))
    assert changed > 50


def test_swapping_needs_another_sample() -> None:
    with pytest.raises(ValueError, match="another sample to swap with, got length=1"):
        dataset(length=1, swap_sounds=True)


@pytest.mark.parametrize("key", range(10))
def test_a_key_sounds_its_two_frequencies(key: int) -> None:
    chance = np.random.default_rng(key)
    power = np.mean([np.abs(np.fft.rfft(tone(key, chance))) ** 2 for _ in range(50)], axis=0)
    hertz = np.fft.rfftfreq(FRAME * FRAMES, 1 / SAMPLE_RATE)
    low, high = (hertz[band][power[band].argmax()] for band in (hertz < 1060, hertz > 1100))
    assert (low, high) == pytest.approx(FREQUENCIES[key], rel=0.02)


def test_spectra_and_their_pictures() -> None:
    chance = np.random.default_rng(0)
    found = spectrum(np.stack([tone(key, chance) for key in range(10)] * 20))
    assert found.shape == (200, FRAMES, BINS) and found.dtype == np.float32
    assert abs(found.mean()) < 0.3 and 0.7 < found.std() < 1.4
    drawn = picture(found)
    assert drawn.shape == (200, 8, FRAMES) and drawn.min() >= 0 and drawn.max() <= 16


def test_the_module_says_what_is_swapped_and_validates_on_other_samples() -> None:
    data = TonesData(train_samples=50, val_samples=50, swap_images=True, swap_sounds=True)
    data.setup("fit")
    assert data.swapped == "images and sounds"
    assert data.train_set.seed != data.held_out_set.seed
    assert not data.train_set.swap_images and data.held_out_set.swap_images
    images, question, answer = data.held_out_set.describe(0)
    assert images.shape[1:] == (8, 8) and question in Token.__members__ and answer.isdecimal()

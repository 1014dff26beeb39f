"""Questions about handwritten digits: the data of the digits demo.

A sample has a few real 8x8 scans (scikit-learn's `load_digits`) and one question about them::

    [BOS] <IMAGE> x k [READ | SUM | MAX] answer digits [EOS]

The answer to READ is the digits in order, to SUM the decimal digits of their sum, to MAX the largest digit. Only READ
needs every image at its position, so READ shows that each image reaches the language model. The number of images k
differs between samples on purpose, because multimodal loaders often handle that incorrectly.

Samples are not stored. Sample `index` is computed from `(seed, index)` on request, so it is the same in every process,
worker and epoch, and the ranks of different modules agree on it without communication.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import IntEnum
from typing import NamedTuple, TypedDict

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_mimo.errors import ConfigError

VOCAB_SIZE = 32
"""Rows of the embedding table: more than the ids in use, so that tensor-parallel sizes divide it."""

TRAIN_SHARE = 0.8


class Token(IntEnum):
    """Token ids above the ten digits, which are the ids 0 to 9."""

    PAD = 10
    BOS = 11
    EOS = 12
    IMAGE = 13
    """Placeholder that the language model replaces by the embedding of an image."""
    READ = 14
    SUM = 15
    MAX = 16


QUESTIONS = (Token.READ, Token.SUM, Token.MAX)


class Sample(TypedDict):
    """One training sample; S is the same for all samples of a dataset, k is not."""

    input_ids: Tensor
    """int64 [S]"""
    labels: Tensor
    """int64 [S]: the token to predict at each position, which is the next token."""
    loss_mask: Tensor
    """float32 [S]: 1 where the label is an answer digit or EOS."""
    modality_inputs: dict[str, dict[str, dict[str, Tensor]]]
    """{"images": {"vit": {"pixel_values": float32 [k, 1, 8, 8]}}}, or {} if images were not requested."""


def answer_tokens(question: Token, digits: Sequence[int]) -> list[int]:
    """Return the answer to `question` about `digits` as digit tokens, most significant first, without EOS."""
    if question is Token.READ:
        return list(digits)
    if question is Token.SUM:
        return [int(character) for character in str(sum(digits))]
    return [max(digits)]


def decode_answer(tokens: Sequence[int] | Tensor) -> str:
    """Convert predicted answer tokens up to EOS to text: `[1, 2, EOS]` is "12".

    A token that cannot be part of an answer is shown by name or number, such as `<IMAGE>`.
    """
    text = ""
    for token in map(int, tokens):
        if token == Token.EOS:
            break
        if token < 10:
            text += str(token)
        else:
            text += f"<{Token(token).name if token in Token else token}>"
    return text


def _check_max_images(max_images: int) -> None:
    if max_images < 1:
        raise ConfigError(f"max_images={max_images}: a sample has at least one image.")


def sequence_length(max_images: int) -> int:
    """Return S: BOS, the images, the question and the longest answer. EOS occurs only as a label."""
    longest_answer = max(max_images, len(str(9 * max_images)))
    return 1 + max_images + 1 + longest_answer


def normalise(scans: np.ndarray) -> np.ndarray:
    """Scale pixel values from 0..16 to about zero mean and unit variance."""
    return (scans / 16 - 0.3) / 0.38


_PIXEL_DISTANCE = (np.arange(8)[:, None] - np.arange(8)).astype(np.float32)


def shift_images(scans: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Shift each image by a fraction of a pixel, with bilinear interpolation and zero padding.

    Shifts by entire pixels are too large for 8x8 images: they cost most of the accuracy.

    Args:
        scans: float32 [k, 8, 8], background 0.
        shifts: float [k, 2], pixels down and to the right.

    Returns:
        float32 [k, 8, 8].
    """
    # Bilinear interpolation is a product of tent functions, so a shift is two 8x8 matrices per image.
    distance = np.abs(_PIXEL_DISTANCE - shifts[:, :, None, None].astype(np.float32))
    tents = np.maximum(0, 1 - distance)
    down, right = tents[:, 0], tents[:, 1]
    return down @ scans @ right.transpose(0, 2, 1)


class _Draw(NamedTuple):
    """Random choices for one sample. Only the first `count` picks and shifts are used."""

    count: int
    question: Token
    picks: np.ndarray  # int64 [max_images], rows of the image pool
    shifts: np.ndarray  # float64 [max_images, 2], pixels


class DigitsDataset(Dataset[Sample]):
    """Questions about a pool of digit images, computed on demand from `(seed, index)`.

    Args:
        images: float32 [n, 8, 8] with values 0..16, the pool to draw from. Accessed only if images are requested.
        targets: int64 [n], the digit in each image.
        length: number of samples.
        seed: seed of all samples; other seeds give unrelated samples.
        max_images: maximum number of images in a sample; the minimum is 1.
        augment: shift each image by up to half a pixel in each direction.
        swap_images: use the images of the previous sample with an unchanged text. A model that uses the images then
            gives wrong answers.
    """

    def __init__(
        self,
        images: np.ndarray,
        targets: np.ndarray,
        *,
        length: int,
        seed: int,
        max_images: int = 2,
        augment: bool = False,
        swap_images: bool = False,
    ) -> None:
        if len(images) != len(targets):
            raise ValueError(f"DigitsDataset got {len(images)} images but {len(targets)} targets")
        _check_max_images(max_images)
        if swap_images and length < 2:
            raise ValueError(f"DigitsDataset(swap_images=True) needs another sample to swap, got {length=}")
        self.images = images
        self.targets = targets
        self.length = length
        self.seed = seed
        self.max_images = max_images
        self.augment = augment
        self.swap_images = swap_images
        self.sequence_length = sequence_length(max_images)
        # One row per sample, so that samples do not depend on the length. Drawn in advance, because creating a
        # generator for each sample would take longer than everything else.
        self._chances = np.random.default_rng(seed).random((length, 2 + 3 * max_images))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """Return the sample with the inputs of all modules."""
        return self.load(index, ("images", "language"))

    def load(self, index: int, modules: Collection[str]) -> Sample:
        """Return sample `index` with the inputs of `modules` only: without "images", no image is accessed.

        The text is always included: it is cheap, and every rank can count the loss tokens from it.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of a DigitsDataset of {self.length}")
        draw = self._draw(index)
        input_ids, labels, loss_mask = self._text(draw)
        modality_inputs = {}
        if "images" in modules:
            modality_inputs["images"] = {"vit": {"pixel_values": self._pixel_values(index, draw)}}
        return Sample(input_ids=input_ids, labels=labels, loss_mask=loss_mask, modality_inputs=modality_inputs)

    def describe(self, index: int) -> tuple[np.ndarray, str, str]:
        """Return sample `index` in readable form.

        Returns:
            The images shown, as float32 [k, 8, 8] with values 0..16 and not augmented; the name of the
            question, such as "SUM"; and the expected answer, such as "12".
        """
        draw = self._draw(index)
        shown = self._shown(index, draw)
        answer = decode_answer(answer_tokens(draw.question, self._digits(draw)))
        return self.images[shown.picks[: draw.count]], draw.question.name, answer

    def _draw(self, index: int) -> _Draw:
        uniform = self._chances[index]
        chosen, placed = uniform[2 : 2 + self.max_images], uniform[2 + self.max_images :]
        return _Draw(
            count=1 + int(uniform[0] * self.max_images),
            question=QUESTIONS[int(uniform[1] * len(QUESTIONS))],
            picks=(chosen * len(self.targets)).astype(np.int64),
            shifts=placed.reshape(self.max_images, 2) - 0.5,
        )

    def _shown(self, index: int, draw: _Draw) -> _Draw:
        """Return the draw whose images are used: `draw` itself, or that of the previous sample."""
        return self._draw((index - 1) % self.length) if self.swap_images else draw

    def _digits(self, draw: _Draw) -> list[int]:
        return self.targets[draw.picks[: draw.count]].tolist()

    def _text(self, draw: _Draw) -> tuple[Tensor, Tensor, Tensor]:
        prompt = [Token.BOS, *[Token.IMAGE] * draw.count, draw.question]
        target = [*answer_tokens(draw.question, self._digits(draw)), Token.EOS]
        tokens = prompt + target
        spare = self.sequence_length + 1 - len(tokens)
        padding = [Token.PAD] * spare
        # NumPy is several times faster than torch.tensor for lists this short.
        input_ids = np.array(tokens[:-1] + padding, dtype=np.int64)
        labels = np.array(tokens[1:] + padding, dtype=np.int64)
        loss_mask = np.array([0] * (len(prompt) - 1) + [1] * len(target) + [0] * spare, dtype=np.float32)
        return torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(loss_mask)

    def _pixel_values(self, index: int, draw: _Draw) -> Tensor:
        shown = self._shown(index, draw)
        scans = self.images[shown.picks[: draw.count]]
        if self.augment:
            scans = shift_images(scans, shown.shifts[: draw.count])
        return torch.from_numpy(normalise(scans)[:, None])


def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits: float32 [1797, 8, 8] with values 0..16, and int64 [1797] labels.

    Raises:
        ImportError: if scikit-learn is missing. It is imported here so that everything else works without it.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The digits demo takes its images from scikit-learn, which could not be imported. "
            "Install it with: pip install lightning-mimo[digits]"
        ) from error
    digits = load_digits()
    return digits.images.astype(np.float32), digits.target.astype(np.int64)


def split_scans(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the training images (80 %) and of the held-out images, chosen at random by `seed`."""
    order = np.random.default_rng(seed).permutation(count)
    train_count = round(TRAIN_SHARE * count)
    return order[:train_count], order[train_count:]


class ScansData(pl.LightningDataModule):
    """Loaders of a `train_set` and a `held_out_set`, which a subclass builds from the scans in `setup`.

    The loaders are those of a one-process script; `MimoStrategy` rebuilds them for each rank. Samples differ in their
    number of images, which the collation of `MimoStrategy` supports and torch's default collation does not.

    Args:
        global_batch_size: samples per global batch over all ranks. Must be equal to that of the strategy.
        num_workers: number of loader worker processes. Samples are so cheap that 0 is usually fastest.
    """

    train_set: Dataset[Sample]
    held_out_set: Dataset[Sample]

    def __init__(self, *, global_batch_size: int, num_workers: int) -> None:
        super().__init__()
        if global_batch_size < 1 or num_workers < 0:
            raise ConfigError(f"data: {global_batch_size=} must be at least 1, and {num_workers=} at least 0.")
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers

    def prepare_data(self) -> None:
        """Check that the images are available. They are part of scikit-learn, so nothing is downloaded."""
        load_scans()

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return the shuffled loader of the training samples."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return the loader of the held-out samples."""
        return self._loader(self.held_out_set)

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return the loader of the held-out samples."""
        return self._loader(self.held_out_set)

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Return the loader of the held-out samples."""
        return self._loader(self.held_out_set)

    def _loader(self, dataset: Dataset[Sample], shuffle: bool = False) -> DataLoader[Sample]:
        return DataLoader(dataset, batch_size=self.global_batch_size, shuffle=shuffle, num_workers=self.num_workers)


class DigitsData(ScansData):
    """Questions about handwritten digits: training on 80 % of the images, validation on the others.

    Args:
        global_batch_size: samples per global batch over all ranks. Must be equal to that of the strategy.
        train_samples: samples per training epoch.
        val_samples: samples of the validation, test and prediction sets, which are the same.
        max_images: maximum number of images in a sample; the minimum is 1.
        seed: seed of the split of the images and of all samples.
        swap_images: validate, test and predict with the images of the previous sample. The accuracy of a model that
            uses the images then falls to chance. Training is not affected.
        num_workers: number of loader worker processes. Samples are so cheap that 0 is usually fastest.
    """

    def __init__(
        self,
        *,
        global_batch_size: int = 64,
        train_samples: int = 51200,
        val_samples: int = 1024,
        max_images: int = 2,
        seed: int = 1,
        swap_images: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__(global_batch_size=global_batch_size, num_workers=num_workers)
        _check_max_images(max_images)
        self.train_samples = train_samples
        self.val_samples = val_samples
        self.max_images = max_images
        self.seed = seed
        self.swap_images = swap_images

    @property
    def swapped(self) -> str:
        """Names of the inputs that are swapped between samples, for messages."""
        return "images" if self.swap_images else ""

    def setup(self, stage: str) -> None:
        """Build `held_out_set`, and for fitting `train_set`.

        Args:
            stage: "fit", "validate", "test" or "predict", from Lightning.
        """
        images, targets = load_scans()
        train, held_out = split_scans(len(images), self.seed)
        if stage == "fit":
            self.train_set = DigitsDataset(
                images[train],
                targets[train],
                length=self.train_samples,
                seed=self.seed,
                max_images=self.max_images,
                augment=True,
            )
        self.held_out_set = DigitsDataset(
            images[held_out],
            targets[held_out],
            length=self.val_samples,
            seed=self.seed,
            max_images=self.max_images,
            swap_images=self.swap_images,
        )

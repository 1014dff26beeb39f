"""Questions about handwritten digits and keypad tones: the data of the digits demo with sound.

A sample has one or two images of digits, one or two keypad tones, and one question about them::

    [BOS] <IMAGE> x k <CLIP> x m [READ | HEAR | BOTH | MAX] answer digits [EOS]

The answer to READ is the digits of the images in order, to HEAR the keys of the tones in order, to BOTH all of them,
and to MAX the largest of all. As in `examples.digits`, sample `index` is computed from `(seed, index)` on request.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from examples.digits.data import Sample, ScansData, load_scans, normalise, shift_images, split_scans
from examples.digits_avlm.tones import picture, spectrum, tone

VOCAB_SIZE = 32
"""Rows of the embedding table: more than the ids in use, so that tensor-parallel sizes divide it."""

MOST = 2
"""Maximum number of images, and of tones, in one sample."""

SEQUENCE_LENGTH = 1 + 2 * MOST + 1 + 2 * MOST
"""BOS, images and tones, the question, the longest answer. EOS occurs only as a label."""


class Token(IntEnum):
    """Token ids above the ten digits, which are the ids 0 to 9. Ids 10 to 13 are those of `examples.digits`."""

    PAD = 10
    BOS = 11
    EOS = 12
    IMAGE = 13
    """Placeholder that the language model replaces by the embedding of an image."""
    CLIP = 14
    """Placeholder that the language model replaces by the embedding of a tone."""
    READ = 15
    HEAR = 16
    BOTH = 17
    MAX = 18


QUESTIONS = (Token.READ, Token.HEAR, Token.BOTH, Token.MAX)


def answer_tokens(question: Token, seen: Sequence[int], heard: Sequence[int]) -> list[int]:
    """Return the answer to `question` as digit tokens, without EOS."""
    match question:
        case Token.READ:
            return list(seen)
        case Token.HEAR:
            return list(heard)
        case Token.BOTH:
            return [*seen, *heard]
        case _:
            return [max([*seen, *heard])]


class _Draw(NamedTuple):
    """Random choices for one sample."""

    question: Token
    picks: np.ndarray  # int64 [k], rows of the image pool
    keys: list[int]  # m digits


class TonesDataset(Dataset[Sample]):
    """Questions about a pool of digit images and about tones, computed on demand from `(seed, index)`.

    Args:
        images: float32 [n, 8, 8] with values 0..16, the pool to draw from. Accessed only if images are requested.
        targets: int64 [n], the digit in each image.
        length: number of samples.
        seed: seed of all samples, including tones; other seeds give unrelated samples.
        augment: shift each image by up to half a pixel in each direction.
        swap_images: use the images of another sample with an unchanged text.
        swap_sounds: use the tones of another sample with an unchanged text.
    """

    def __init__(
        self,
        images: np.ndarray,
        targets: np.ndarray,
        *,
        length: int,
        seed: int,
        augment: bool = False,
        swap_images: bool = False,
        swap_sounds: bool = False,
    ) -> None:
        if (swap_images or swap_sounds) and length < 2:
            raise ValueError(f"TonesDataset needs another sample to swap with, got {length=}")
        self.images = images
        self.targets = targets
        self.length = length
        self.seed = seed
        self.augment = augment
        self.swap_images = swap_images
        self.swap_sounds = swap_sounds
        self._draws = np.random.default_rng(seed).random((length, 3 + 2 * MOST))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """Return the sample with the inputs of all modules."""
        return self.load(index, ("images", "audio", "language"))

    def load(self, index: int, modules: Collection[str]) -> Sample:
        """Return sample `index` with the inputs of `modules` only: without "audio", no tone is generated.

        Its `modality_inputs` are {"images": {"vit": {"pixel_values": float32 [k, 1, 8, 8]}}, "audio": {"clips":
        {"features": float32 [m, FRAMES, BINS]}}}.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of a TonesDataset of {self.length}")
        input_ids, labels, loss_mask = self._text(self._draw(index))
        inputs = {}
        if "images" in modules:
            inputs["images"] = {"vit": {"pixel_values": torch.from_numpy(self._pixels(index))}}
        if "audio" in modules:
            inputs["audio"] = {"clips": {"features": torch.from_numpy(self._features(index))}}
        return Sample(input_ids=input_ids, labels=labels, loss_mask=loss_mask, modality_inputs=inputs)

    def describe(self, index: int) -> tuple[np.ndarray, str, str]:
        """Return sample `index` in readable form.

        Returns:
            The images without augmentation, followed by the spectra of the tones, as float32 [k + m, 8, 8] with values
            0..16; the name of the question; and the expected answer, such as "12".
        """
        draw = self._draw(index)
        shown = self.images[self._shown(index).picks]
        answer = answer_tokens(draw.question, self._seen(draw), draw.keys)
        return np.concatenate([shown, picture(self._features(index))]), draw.question.name, "".join(map(str, answer))

    def _draw(self, index: int) -> _Draw:
        uniform = self._draws[index]
        images, keys = (1 + int(u * MOST) for u in uniform[1:3])
        return _Draw(
            question=QUESTIONS[int(uniform[0] * len(QUESTIONS))],
            picks=(uniform[3 : 3 + images] * len(self.targets)).astype(np.int64),
            keys=[int(u * 10) for u in uniform[3 + MOST : 3 + MOST + keys]],
        )

    def _partner(self, index: int) -> int:
        """Index of the closest previous sample with the same numbers of images and tones."""
        draw = self._draw(index)
        for step in range(1, self.length):
            other = self._draw((index - step) % self.length)
            if (len(other.picks), len(other.keys)) == (len(draw.picks), len(draw.keys)):
                return (index - step) % self.length
        return index

    def _shown(self, index: int) -> _Draw:
        return self._draw(self._partner(index) if self.swap_images else index)

    def _seen(self, draw: _Draw) -> list[int]:
        return self.targets[draw.picks].tolist()

    def _text(self, draw: _Draw) -> tuple[Tensor, Tensor, Tensor]:
        prompt = [Token.BOS, *[Token.IMAGE] * len(draw.picks), *[Token.CLIP] * len(draw.keys), draw.question]
        target = [*answer_tokens(draw.question, self._seen(draw), draw.keys), Token.EOS]
        tokens = prompt + target
        spare = SEQUENCE_LENGTH + 1 - len(tokens)
        padding = [Token.PAD] * spare
        mask = [0.0] * (len(prompt) - 1) + [1.0] * len(target) + [0.0] * spare
        input_ids = np.array(tokens[:-1] + padding, dtype=np.int64)
        labels = np.array(tokens[1:] + padding, dtype=np.int64)
        return torch.from_numpy(input_ids), torch.from_numpy(labels), torch.tensor(mask)

    def _chance(self, index: int, what: int) -> np.random.Generator:
        """Random generator for one part of one sample, the same on every rank, whatever else the rank loads."""
        return np.random.default_rng((self.seed, index, what))

    def _pixels(self, index: int) -> np.ndarray:
        scans = self.images[self._shown(index).picks]
        if self.augment:
            scans = shift_images(scans, self._chance(index, 0).random((len(scans), 2)) - 0.5)
        return normalise(scans)[:, None]

    def _features(self, index: int) -> np.ndarray:
        if self.swap_sounds:
            index = self._partner(index)
        chance = self._chance(index, 1)
        return spectrum(np.stack([tone(key, chance) for key in self._draw(index).keys]))


class TonesData(ScansData):
    """Questions about handwritten digits and tones, validated on images and tones that are not in the training data.

    Args:
        global_batch_size: samples per global batch over all ranks. Must be equal to that of the strategy.
        train_samples: samples per training epoch.
        val_samples: samples of the validation, test and prediction sets, which are the same.
        seed: seed of the split of the images and of all samples.
        swap_images: validate, test and predict with the images of other samples. Training is not affected.
        swap_sounds: validate, test and predict with the tones of other samples. Training is not affected.
        num_workers: number of loader worker processes.
    """

    def __init__(
        self,
        *,
        global_batch_size: int = 64,
        train_samples: int = 51200,
        val_samples: int = 1024,
        seed: int = 1,
        swap_images: bool = False,
        swap_sounds: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__(global_batch_size=global_batch_size, num_workers=num_workers)
        self.train_samples = train_samples
        self.val_samples = val_samples
        self.seed = seed
        self.swap_images = swap_images
        self.swap_sounds = swap_sounds

    @property
    def swapped(self) -> str:
        """Names of the inputs that are swapped between samples, for messages."""
        return " and ".join(["images"] * self.swap_images + ["sounds"] * self.swap_sounds)

    def setup(self, stage: str) -> None:
        """Build `held_out_set`, and for fitting `train_set`.

        Args:
            stage: "fit", "validate", "test" or "predict", from Lightning.
        """
        images, targets = load_scans()
        train, held_out = split_scans(len(images), self.seed)
        if stage == "fit":
            self.train_set = TonesDataset(
                images[train], targets[train], length=self.train_samples, seed=2 * self.seed, augment=True
            )
        self.held_out_set = TonesDataset(
            images[held_out],
            targets[held_out],
            length=self.val_samples,
            seed=2 * self.seed + 1,
            swap_images=self.swap_images,
            swap_sounds=self.swap_sounds,
        )

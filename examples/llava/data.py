"""Conversations about images from a folder. Text is tokenized and images are resized beforehand.

The folder contains `train.jsonl` and `val.jsonl` with one sample per line, and the images as NumPy arrays::

    {"tokens": [1, 32000, 502, 88, 2], "answer_from": 3, "images": ["000/17.npy"]}

`tokens` has one image token for each image, in order. The model is trained on the tokens from index `answer_from` on.
An image is a file of `numpy.save` with uint8 [channels, height, width].
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class Conversations(Dataset[dict[str, Any]]):
    """The samples of one file. Ranks that do not run the encoder open no images.

    Args:
        file: path of a file such as `train.jsonl`; the paths of images are relative to its folder.
        image_token_id: placeholder of images: one per image in `tokens`, `tokens_per_image` per image in `input_ids`.
        tokens_per_image: number of language tokens per image.
        max_sequence_length: maximum length of `input_ids`.
    """

    def __init__(self, file: Path, *, image_token_id: int, tokens_per_image: int, max_sequence_length: int) -> None:
        self.file = file
        self.image_token_id = image_token_id
        self.tokens_per_image = tokens_per_image
        self.max_sequence_length = max_sequence_length
        # Byte offset of each line, so that single samples can be read.
        with file.open("rb") as lines:
            lengths = [len(line) for line in lines]
        self._begins = np.cumsum([0, *lengths[:-1]]) if lengths else np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the sample with the inputs of all modules."""
        return self.load(index, ("images", "language"))

    def load(self, index: int, modules: Collection[str]) -> dict[str, Any]:
        """Return sample `index` with the inputs of `modules` only."""
        with self.file.open("rb") as lines:
            lines.seek(int(self._begins[index]))
            record = json.loads(lines.readline())
        tokens, counts = self._spread(record["tokens"])
        if counts != len(record["images"]):
            raise ValueError(
                f"{self.file}, sample {index}: {counts} image tokens, but {len(record['images'])} images. Write "
                f"{self.image_token_id} once for each image."
            )
        if len(tokens) - 1 > self.max_sequence_length:
            raise ValueError(
                f"{self.file}, sample {index}: {len(tokens) - 1} tokens, images included, are more than "
                f"max_sequence_length={self.max_sequence_length}. Remove it from the file, or shorten it."
            )
        answer = len(tokens) - (len(record["tokens"]) - record["answer_from"])
        labels = tokens[1:]
        sample: dict[str, Any] = {
            "input_ids": tokens[:-1],
            "labels": torch.where(labels == self.image_token_id, 0, labels),
            "loss_mask": (torch.arange(1, len(tokens)) >= answer).float(),
            "modality_inputs": {},
        }
        if "images" in modules and record["images"]:
            pixels = np.stack([np.load(self.file.parent / name) for name in record["images"]])
            sample["modality_inputs"] = {
                "images": {"vit": {"pixel_values": torch.from_numpy(pixels).float() / 127.5 - 1}}
            }
        return sample

    def _spread(self, tokens: list[int]) -> tuple[torch.Tensor, int]:
        """Repeat each image token `tokens_per_image` times; also return the number of images."""
        whole = torch.tensor(tokens)
        is_image = whole == self.image_token_id
        return whole.repeat_interleave(torch.where(is_image, self.tokens_per_image, 1)), int(is_image.sum())


class ConversationData(pl.LightningDataModule):
    """Training and validation conversations from a folder.

    Args:
        folder: folder with `train.jsonl` and `val.jsonl`.
        global_batch_size: samples per global batch over all ranks. Must be equal to that of the strategy.
        image_token_id: placeholder of images. Must be equal to that of the model.
        tokens_per_image: number of language tokens per image. Must be equal to that of the model.
        max_sequence_length: maximum length of `input_ids`. Must not be larger than that of the model.
        num_workers: number of loader worker processes on each rank.
    """

    def __init__(
        self,
        *,
        folder: Path,
        global_batch_size: int,
        image_token_id: int,
        tokens_per_image: int,
        max_sequence_length: int,
        num_workers: int = 4,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.global_batch_size = global_batch_size
        self.image_token_id = image_token_id
        self.tokens_per_image = tokens_per_image
        self.max_sequence_length = max_sequence_length
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader:
        """Return the shuffled loader of `train.jsonl`."""
        return self._loader("train.jsonl", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Return the loader of `val.jsonl`."""
        return self._loader("val.jsonl")

    def _loader(self, name: str, *, shuffle: bool = False) -> DataLoader:
        dataset = Conversations(
            self.folder / name,
            image_token_id=self.image_token_id,
            tokens_per_image=self.tokens_per_image,
            max_sequence_length=self.max_sequence_length,
        )
        return DataLoader(
            dataset, batch_size=self.global_batch_size, shuffle=shuffle, num_workers=self.num_workers, pin_memory=True
        )

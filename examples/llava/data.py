"""Conversations about images, tokenized and cut to size beforehand, from a folder.

The folder holds `train.jsonl` and `val.jsonl`, one sample a line, and the images as arrays beside them::

    {"tokens": [1, 32000, 502, 88, 2], "answer_from": 3, "images": ["000/17.npy"]}

`tokens` has one image token for each image, in order; the tokens from `answer_from` on are what the model is to say.
An image is uint8 [channels, height, width], in a file of `numpy.save`. Which tokenizer and which crop: those of the
weights you start from.
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
    """The samples of one file. A rank without images opens none.

    Args:
        file: such as `train.jsonl`; the paths of images are relative to its folder.
        image_token_id: stands in `tokens` once for each image, and in `input_ids` once for each of its tokens.
        tokens_per_image: language tokens that one image becomes.
        max_sequence_length: longest `input_ids`.
    """

    def __init__(self, file: Path, *, image_token_id: int, tokens_per_image: int, max_sequence_length: int) -> None:
        self.file = file
        self.image_token_id = image_token_id
        self.tokens_per_image = tokens_per_image
        self.max_sequence_length = max_sequence_length
        # Where each line begins: the file itself is read sample by sample.
        with file.open("rb") as lines:
            lengths = [len(line) for line in lines]
        self._begins = np.cumsum([0, *lengths[:-1]]) if lengths else np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the whole sample."""
        return self.load(index, ("images", "language"))

    def load(self, index: int, modules: Collection[str]) -> dict[str, Any]:
        """Return sample `index` with only what `modules` need."""
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
                f"max_sequence_length={self.max_sequence_length}. Leave it out of the file, or cut it."
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
        """Tokens with as many placeholders for an image as it has tokens, and the number of images."""
        whole = torch.tensor(tokens)
        is_image = whole == self.image_token_id
        return whole.repeat_interleave(torch.where(is_image, self.tokens_per_image, 1)), int(is_image.sum())


class ConversationData(pl.LightningDataModule):
    """Training and validation conversations of a folder.

    Args:
        folder: with `train.jsonl` and `val.jsonl`.
        global_batch_size: samples per optimizer step, over all ranks. Must be that of the strategy.
        image_token_id: as for `Conversations`; the model must agree.
        tokens_per_image: the same.
        max_sequence_length: the same.
        num_workers: loader worker processes of each rank.
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

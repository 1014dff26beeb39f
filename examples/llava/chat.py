"""Conversations in LLaVA's format, made into samples by the tokenizer and the image processor of a pretrained folder.

The data folder contains `train.jsonl` and `val.jsonl` with one conversation per line, and the images::

    {"image": "000/17.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                              {"from": "gpt", "value": "A cat."}]}

The published files of LLaVA are JSON lists of such records; `jq -c '.[]' FILE.json > train.jsonl` converts them. The
model is trained on the answers and the end-of-sequence tokens after them.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from examples.llava.lines import JsonLines

IMAGE = "<image>"


class Dialogs(Dataset[dict[str, Any]]):
    """The samples of one file. Ranks that do not run the encoder open no images.

    A conversation that is too long is cut at its end, as LLaVA does.

    Args:
        file: path of a file such as `train.jsonl`; the paths of images are relative to its folder.
        pretrained: folder of a LLaVA-1.5 with its tokenizer and image processor.
        max_sequence_length: maximum length of `input_ids`.
    """

    def __init__(self, file: Path, pretrained: Path, *, max_sequence_length: int) -> None:
        config = AutoConfig.from_pretrained(pretrained)
        self.file = file
        self.max_sequence_length = max_sequence_length
        self.tokenizer = AutoTokenizer.from_pretrained(pretrained)
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(IMAGE)
        vision = config.vision_config
        is_whole = config.vision_feature_select_strategy == "full"  # with the class token
        self.tokens_per_image = (vision.image_size // vision.patch_size) ** 2 + is_whole
        self._processor = AutoImageProcessor.from_pretrained(pretrained)
        self._records = JsonLines(file)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the sample with the inputs of all modules."""
        return self.load(index, ("images", "language"))

    def load(self, index: int, modules: Collection[str]) -> dict[str, Any]:
        """Return sample `index` with the inputs of `modules` only; labels in the format of transformers."""
        record = self._records[index]
        names = [record["image"]] if "image" in record else []
        input_ids, labels = self._tokens(record["conversations"])
        if (found := int((input_ids == self.image_token_id).sum())) != len(names) * self.tokens_per_image:
            raise ValueError(
                f"{self.file}, sample {index}: {len(names)} images, but {found} image tokens of "
                f"{self.tokens_per_image} per image within max_sequence_length={self.max_sequence_length}. Write "
                f"{IMAGE} once for each image, near the beginning."
            )
        sample: dict[str, Any] = {"input_ids": input_ids, "labels": labels, "modality_inputs": {}}
        if "images" in modules and names:
            pictures = [Image.open(self.file.parent / name).convert("RGB") for name in names]
            pixels = self._processor(images=pictures, return_tensors="pt")["pixel_values"]
            sample["modality_inputs"] = {"images": {"vision": {"pixel_values": pixels}}}
        return sample

    def _tokens(self, turns: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids, and labels that are -100 except for answers."""
        ids: list[int] = []
        labels: list[int] = []
        for human, answer in zip(turns[::2], turns[1::2], strict=True):
            asked = self.tokenizer(f"USER: {human['value']} ASSISTANT:", add_special_tokens=not ids)["input_ids"]
            said = self.tokenizer(answer["value"], add_special_tokens=False)["input_ids"]
            said.append(self.tokenizer.eos_token_id)
            ids += [*asked, *said]
            labels += [*[-100] * len(asked), *said]
        whole = torch.tensor(ids)
        times = torch.where(whole == self.image_token_id, self.tokens_per_image, 1)
        spread = [each.repeat_interleave(times)[: self.max_sequence_length] for each in (whole, torch.tensor(labels))]
        return spread[0], spread[1]


class ChatData(pl.LightningDataModule):
    """Training and validation conversations from a folder, for HuggingFaceModule(labels_shifted=False).

    Args:
        folder: folder with `train.jsonl` and `val.jsonl`.
        pretrained: folder of the model, with its tokenizer and image processor.
        global_batch_size: samples per global batch over all ranks. Must be equal to that of the strategy.
        max_sequence_length: maximum length of `input_ids`. Must not be larger than that of the model.
        num_workers: number of loader worker processes on each rank.
    """

    def __init__(
        self,
        *,
        folder: Path,
        pretrained: Path,
        global_batch_size: int,
        max_sequence_length: int = 2048,
        num_workers: int = 4,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.pretrained = Path(pretrained)
        self.global_batch_size = global_batch_size
        self.max_sequence_length = max_sequence_length
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader:
        """Return the shuffled loader of `train.jsonl`."""
        return self._loader("train.jsonl", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Return the loader of `val.jsonl`."""
        return self._loader("val.jsonl")

    def _loader(self, name: str, *, shuffle: bool = False) -> DataLoader:
        data = Dialogs(self.folder / name, self.pretrained, max_sequence_length=self.max_sequence_length)
        return DataLoader(data, batch_size=self.global_batch_size, shuffle=shuffle, num_workers=self.num_workers)

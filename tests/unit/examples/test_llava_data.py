"""Conversations about images from a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.llava.data import ConversationData, Conversations

IMAGE = 99
RECORDS = [
    {"tokens": [1, IMAGE, 5, 6, 7], "answer_from": 3, "images": ["a.npy"]},
    {"tokens": [1, 8, 9], "answer_from": 2, "images": []},
    {"tokens": [1, IMAGE, 4, IMAGE, 2], "answer_from": 4, "images": ["a.npy", "b.npy"]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, value in (("a", 0), ("b", 255)):
        np.save(tmp_path / f"{name}.npy", np.full((3, 4, 4), value, dtype=np.uint8))
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return tmp_path


def conversations(folder: Path, **options: int) -> Conversations:
    arguments = {"image_token_id": IMAGE, "tokens_per_image": 2, "max_sequence_length": 8, **options}
    return Conversations(folder / "train.jsonl", **arguments)


def test_a_sample_by_hand(folder: Path) -> None:
    sample = conversations(folder)[0]
    assert sample["input_ids"].tolist() == [1, IMAGE, IMAGE, 5, 6]
    assert sample["labels"].tolist() == [0, 0, 5, 6, 7]
    assert sample["loss_mask"].tolist() == [0, 0, 0, 1, 1]


def test_images_are_opened_by_ranks_that_need_them_only(folder: Path) -> None:
    data = conversations(folder)
    values = data[2]["modality_inputs"]["images"]["vit"]["pixel_values"]
    assert values.shape == (2, 3, 4, 4) and values.dtype == torch.float32
    assert values[0].unique().tolist() == [-1.0] and values[1].unique().tolist() == [1.0]
    assert data[1]["modality_inputs"] == {}
    for name in ("a", "b"):
        (folder / f"{name}.npy").unlink()
    assert data.load(2, {"language"})["input_ids"].tolist() == [1, IMAGE, IMAGE, 4, IMAGE, IMAGE]


def test_a_sample_that_is_too_long_or_lacks_an_image_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.jsonl, sample 2: 6 tokens.*max_sequence_length=5"):
        conversations(folder, max_sequence_length=5)[2]
    record = {**RECORDS[0], "images": []}
    (folder / "train.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="sample 0: 1 image tokens, but 0 images"):
        conversations(folder)[0]


def test_loaders_are_those_of_one_process(folder: Path) -> None:
    data = ConversationData(
        folder=folder,
        global_batch_size=3,
        image_token_id=IMAGE,
        tokens_per_image=2,
        max_sequence_length=8,
        num_workers=0,
    )
    assert len(data.train_dataloader().dataset) == len(data.val_dataloader().dataset) == 3
    assert data.train_dataloader().batch_size == 3

"""Images of Idefics3 and SmolVLM: rows of tiles of one size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from lightning_mimo import ConfigError, DataError
from lightning_mimo.data.encoder_inputs import concatenate, read_inputs
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.models.hugging_face.idefics3 import Tiles
from lightning_mimo.models.hugging_face.registry import model_of
from tests.hugging_face.processors import image_processor, word_tokenizer
from tests.hugging_face.tiny_models import MODELS, SPLIT

SIZE = SPLIT["image_size"]
TILES = Tiles(size=SIZE, side=SIZE // SPLIT["patch_size"], shuffled=2)
FORMAT = SampleFormat(encoders={"images": {"vision": TILES.item_sizes}})


def _read(inputs: dict[str, Any]) -> Any:
    return read_inputs(7, {"modality_inputs": {"images": {"vision": inputs}}}, "images", FORMAT)


def test_features_are_shuffled_as_in_transformers() -> None:
    connector = MODELS["idefics3"]().model.connector
    features = torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(5))
    assert torch.equal(TILES.shuffle(features), connector.pixel_shuffle(features, 2).flatten(0, 1))


def test_what_the_processor_gives_is_a_sample() -> None:
    image_module = pytest.importorskip("PIL.Image")
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    words = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles, "what"]
    processor = transformers.Idefics3Processor(
        image_processor("Idefics3")(size={"longest_edge": 3 * SIZE}, max_image_size={"longest_edge": SIZE}),
        word_tokenizer(*words),
        image_seq_len=TILES.embeddings_per_tile,
    )
    read = []
    for sizes in [(40, 20)], [(16, 48), (30, 33)]:
        images = [image_module.new("RGB", size, (200, 30, 90)) for size in sizes]
        made = processor(images=[images], text="<image> what " * len(images), return_tensors="pt")
        placeholders = int((made["input_ids"] == processor.image_token_id).sum())
        read.append(_read({name: made[name] for name in ("pixel_values", "pixel_attention_mask")}))
        assert (read[-1].items, read[-1].embeddings) == (1, placeholders)
        assert placeholders > len(images) * TILES.embeddings_per_tile
    together = concatenate("images", read, FORMAT)
    assert together is not None
    most = max(each.arguments["vision"]["pixel_values"].size(1) for each in read)
    assert together["vision"]["pixel_values"].shape == (2, most, 3, SIZE, SIZE)
    assert TILES.embeddings(together["vision"]).tolist() == [each.embeddings for each in read]


def test_other_tiles_are_refused() -> None:
    whole = {"pixel_values": torch.ones(1, 2, 3, SIZE, SIZE), "pixel_attention_mask": torch.ones(1, 2, SIZE, SIZE)}
    large = {"pixel_values": torch.ones(1, 2, 3, 32, 32), "pixel_attention_mask": torch.ones(1, 2, 32, 32)}
    assert _read(whole).embeddings == 8
    with pytest.raises(DataError, match=r"^Sample 7: images.vision: pixel_values has the shape .*, 32, 32\] and"):
        _read(large)
    whole["pixel_attention_mask"][0, 1, 8:] = 0
    with pytest.raises(DataError, match=r"^Sample 7: images.vision: pixel_attention_mask leaves out a part of a tile"):
        _read(whole)
    with pytest.raises(DataError, match=r"asks for 'pixel_attention_mask'\. Give it in every sample"):
        _read({"pixel_values": whole["pixel_values"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_factor": 3}, r"scale_factor=3 with 16 / 4 = 4 patches along an edge is not supported"),
        ({"vision_config.image_size": [16, 32]}, r"image_size=\[16, 32\] is not supported"),
        ({"vision_config.attention_dropout": 0.1}, r"attention_dropout=0.1 is not supported"),
        ({"text_config.mlp_bias": True}, r"mlp_bias=True is not supported"),
    ],
)
def test_config_that_is_not_covered_is_refused(changes: dict[str, Any], message: str) -> None:
    config = MODELS["idefics3"]().config
    for path, value in changes.items():
        *parts, name = path.split(".")
        part = getattr(config, parts[0]) if parts else config
        setattr(part, name, value)
    with pytest.raises(ConfigError, match=message):
        model_of(config)

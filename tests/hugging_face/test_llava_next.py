"""Images of LLaVA-NeXT: in tiles, without margins, with a token at the end of each line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel as Theirs

from lightning_mimo import ConfigError, DataError
from lightning_mimo.data.encoder_inputs import concatenate, read_inputs
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.models.hugging_face.llava_next import AnyResolution
from lightning_mimo.models.hugging_face.registry import model_of
from tests.hugging_face.processors import image_processor, word_tokenizer
from tests.hugging_face.tiny_models import MODELS, RESOLUTIONS, VISION

IMAGES = AnyResolution(
    resolutions=tuple((height, width) for height, width in RESOLUTIONS), tile_size=VISION["image_size"], side=2
)
FORMAT = SampleFormat(encoders={"images": {"vision": IMAGES.item_sizes}})


def test_features_are_in_the_order_of_transformers() -> None:
    model = MODELS["llava_next"]().model
    assert isinstance(model, Theirs)
    sizes = torch.randint(4, 90, (200, 2), generator=torch.Generator().manual_seed(5)).tolist()
    for image in sizes:
        tiles = IMAGES.tiles(image)
        numbered = torch.arange(1.0, 1 + tiles * 4).view(tiles, 4, 1)
        (expected,), _ = model.pack_image_features([numbered], [image], "default", image_newline=torch.zeros(1))
        found = IMAGES.in_lines(numbered, [image])
        assert torch.equal(found[:, 0], expected[:, 0])
        assert torch.equal(found[:, 1] == 1, expected[:, 0] == 0)


def _processed(processor: Any, *sizes: tuple[int, int]) -> dict[str, Any]:
    """A sample of images of some heights and widths."""
    from PIL import Image

    images = [Image.new("RGB", (width, height), (200, 30, 90)) for height, width in sizes]
    made = processor(images=images, text="<image> " * len(images) + "what", return_tensors="pt")
    return {
        "input_ids": made["input_ids"][0],
        "labels": made["input_ids"][0],
        "modality_inputs": {"images": {"vision": {name: made[name] for name in ("pixel_values", "image_sizes")}}},
    }


def test_what_the_processor_gives_is_a_sample() -> None:
    pytest.importorskip("PIL")
    side = VISION["image_size"]
    processor = transformers.LlavaNextProcessor(
        image_processor("LlavaNext")(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=RESOLUTIONS
        ),
        word_tokenizer("<image>", "what"),
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    placeholder = processor.image_token_id
    samples = [_processed(processor, (20, 40)), _processed(processor, (31, 18), (40, 13))]
    read = [read_inputs(i, sample, "images", FORMAT) for i, sample in enumerate(samples)]
    assert [each.embeddings for each in read] == [int((each["input_ids"] == placeholder).sum()) for each in samples]
    together = concatenate("images", read, FORMAT)
    assert together is not None
    assert together["vision"]["pixel_values"].shape == (3, 5, 3, side, side)
    assert together["vision"]["image_sizes"].tolist() == [[20, 40], [31, 18], [40, 13]]


def test_too_few_tiles_are_refused() -> None:
    with pytest.raises(DataError, match=r"an image of 20 \* 31 pixels has 5 tiles by image_grid_pinpoints"):
        IMAGES.cut(torch.zeros(1, 4, 3, 16, 16), [[20, 31]])
    with pytest.raises(DataError, match=r"the shape \(3, 3, 16, 16\), but an image of 20 \* 40 pixels has 3 tiles"):
        IMAGES.cut(torch.zeros(3, 3, 16, 16), [[20, 40]])
    with pytest.raises(DataError, match=r"makes 5 features of a tile, but lines of images need 2 \* 2"):
        IMAGES.in_lines(torch.zeros(3, 5, 48), [[20, 40]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid_pinpoints": [[16, 24]]}, r"\[16, 24\] in image_grid_pinpoints with tiles of .*=16"),
        ({"vision_feature_select_strategy": "full"}, "select_strategy='full' with .*='clip_vision_model'"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer=\[-2, -1\] is not supported"),
    ],
)
def test_config_that_is_not_covered_is_refused(changes: dict[str, Any], message: str) -> None:
    config = MODELS["llava_next"]().config
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=message):
        model_of(config)

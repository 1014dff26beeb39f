"""Tiny random models in the very files of the real ones, made and saved by transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

IMAGE_TOKEN = 99
VIDEO_TOKEN = 100
VISION_START = 101
VOCABULARY = 130  # 2 divides it, 4 does not


def _rope(*, rope_type: str, rope_theta: float, **scaling: float | list[int]) -> dict[str, Any]:
    """Rotary positions as the installed version of transformers wants them."""
    if int(transformers.__version__.partition(".")[0]) >= 5:
        return {"rope_parameters": {"rope_type": rope_type, "rope_theta": rope_theta, **scaling}}
    return {"rope_theta": rope_theta, "rope_scaling": {"rope_type": rope_type, **scaling} if scaling else None}


_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    **_rope(rope_type="default", rope_theta=500000.0),
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# The frequencies of 8 numbers lie on both sides of, and within, what is interpolated.
_LLAMA3_ROPE = _rope(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
VISION = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def _text(kind: str, **changes: Any) -> Callable[[], transformers.PreTrainedModel]:
    def make() -> transformers.PreTrainedModel:
        config = getattr(transformers, f"{kind}Config")(**{**_TEXT, **changes})
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    return make


def _llava(vision: Any, *, tie: bool = False, text: Any = None, **changes: Any) -> transformers.PreTrainedModel:
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text or transformers.LlamaConfig(**{**_TEXT, "tie_word_embeddings": tie}),
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=tie,
        **changes,
    )
    return transformers.LlavaForConditionalGeneration(config)


PATCH = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}


def _qwen_vl(kind: str, *, tie: bool = False, **vision: Any) -> transformers.PreTrainedModel:
    rope = _rope(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2])
    config = getattr(transformers, f"{kind}Config")(
        text_config={**_TEXT, **rope, "tie_word_embeddings": tie},
        vision_config={"depth": 3, "num_heads": 2, **PATCH, **vision},
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_START + 1,
        tie_word_embeddings=tie,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


# Square tiles: 2, 4 and 3 of them beside the one of the whole image.
RESOLUTIONS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]


def _llava_next(vision: Any, *, tie: bool = False, text: Any = None, **changes: Any) -> transformers.PreTrainedModel:
    config = transformers.LlavaNextConfig(
        vision_config=vision,
        text_config=text or transformers.MistralConfig(**{**_TEXT, "sliding_window": None}),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=RESOLUTIONS,
        tie_word_embeddings=tie,
        **changes,
    )
    return transformers.LlavaNextForConditionalGeneration(config)


# A tile has 4 * 4 features, of which 2 * 2 become one embedding.
SPLIT = {**VISION, "patch_size": 4}


def _idefics3(kind: str, *, tie: bool = False) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(
        vision_config=SPLIT,
        text_config={**_TEXT, "model_type": "llama", "tie_word_embeddings": tie},
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        tie_word_embeddings=tie,
        pad_token_id=0,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


AUDIO = {"num_mel_bins": 6, "max_source_positions": 8}


def _qwen2_audio() -> transformers.PreTrainedModel:
    config = transformers.Qwen2AudioConfig(
        audio_config={
            "d_model": 24,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            **AUDIO,
        },
        text_config={**_TEXT, "model_type": "qwen2"},
        audio_token_index=IMAGE_TOKEN,
    )
    return transformers.Qwen2AudioForConditionalGeneration(config)


MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "llama2": _text("Llama", num_key_value_heads=4),
    "llama3": _text("Llama", **_LLAMA3_ROPE),
    "llama_biases": _text("Llama", attention_bias=True),
    "mistral": _text("Mistral", head_dim=16, sliding_window=None),
    "qwen2": _text("Qwen2", tie_word_embeddings=True),
    "qwen3": _text("Qwen3", head_dim=16, tie_word_embeddings=True),
    "mixtral": _text("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3_moe": _text(
        "Qwen3Moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "llava_clip": lambda: _llava(transformers.CLIPVisionConfig(**VISION, projection_dim=48)),
    "llava_qwen2_siglip": lambda: _llava(
        transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text=transformers.Qwen2Config(**{**_TEXT, "tie_word_embeddings": True}),
        tie=True,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    ),
    "llava_qwen3": lambda: _llava(
        transformers.CLIPVisionConfig(**VISION, projection_dim=48),
        text=transformers.Qwen3Config(**{**_TEXT, "head_dim": 16, "tie_word_embeddings": True}),
        tie=True,
    ),
    "llava_mixtral": lambda: _llava(
        transformers.CLIPVisionConfig(**VISION, projection_dim=48),
        text=transformers.MixtralConfig(**{**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
        multimodal_projector_bias=False,
    ),
    "llava_next": lambda: _llava_next(transformers.CLIPVisionConfig(**VISION, projection_dim=48)),
    "llava_next_siglip": lambda: _llava_next(
        transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text=transformers.Qwen2Config(**{**_TEXT, "tie_word_embeddings": True}),
        tie=True,
        vision_feature_select_strategy="full",
    ),
    "idefics3": lambda: _idefics3("Idefics3"),
    "smolvlm": lambda: _idefics3("SmolVLM", tie=True),
    "qwen2_audio": _qwen2_audio,
    "llava_dinov2": lambda: _llava(
        transformers.Dinov2Config(**{k: v for k, v in VISION.items() if k != "intermediate_size"}, mlp_ratio=2)
    ),
    "qwen2_vl": lambda: _qwen_vl("Qwen2VL", embed_dim=32, hidden_size=32, mlp_ratio=2),
    # Windows of two by two embeddings, in which no image of GRIDS but the first ends.
    "qwen2_5_vl": lambda: _qwen_vl(
        "Qwen2_5_VL",
        tie=True,
        hidden_size=48,
        intermediate_size=40,
        out_hidden_size=32,
        window_size=16,
        fullatt_block_indexes=[1],
    ),
}


@dataclass(frozen=True, kw_only=True)
class Items:
    """What samples of a model have beside text.

    Attributes:
        make: number of items and generator -> placeholders of each item, and what the model's processor gives.
        module: whose inputs these are.
        encoder: of that module.
        before: tokens that precede the placeholders of an item.
    """

    make: Callable[[int, torch.Generator], tuple[list[int], dict[str, torch.Tensor]]]
    module: str = "images"
    encoder: str = "vision"
    before: tuple[int, ...] = ()


def _images(number: int, generator: torch.Generator) -> tuple[list[int], dict[str, torch.Tensor]]:
    size, tokens = VISION["image_size"], (VISION["image_size"] // VISION["patch_size"]) ** 2
    return [tokens] * number, {"pixel_values": _normal(number, 3, size, size, generator=generator)}


# Patches of images, along time, height and width.
GRIDS = [(1, 4, 4), (1, 6, 4), (1, 2, 10), (1, 8, 6)]


def _grids(number: int, generator: torch.Generator) -> tuple[list[int], dict[str, torch.Tensor]]:
    grids = [GRIDS[int(torch.randint(len(GRIDS), (), generator=generator))] for _ in range(number)]
    patches = [time * height * width for time, height, width in grids]
    values = 3 * PATCH["temporal_patch_size"] * PATCH["patch_size"] ** 2
    return [each // PATCH["spatial_merge_size"] ** 2 for each in patches], {
        "pixel_values": _normal(sum(patches), values, generator=generator),
        "image_grid_thw": torch.tensor(grids),
    }


# Height and width in pixels, tiles, and tokens: 4 of the whole image, then those of the tiles less the margins that
# fill up the resolution, and one for each line.
TILED = [
    ((20, 40), 3, 4 + 2 * (4 + 1)),
    ((40, 13), 4, 4 + 6 * (2 + 1)),
    ((20, 31), 5, 4 + 2 * (4 + 1)),
    ((31, 18), 5, 4 + 4 * (2 + 1)),
]


def _tiles(number: int, generator: torch.Generator) -> tuple[list[int], dict[str, torch.Tensor]]:
    chosen = [TILED[int(torch.randint(len(TILED), (), generator=generator))] for _ in range(number)]
    most, size = max(tiles for _, tiles, _ in chosen), VISION["image_size"]
    values = _normal(number, most, 3, size, size, generator=generator)
    for image, (_, tiles, _) in zip(values, chosen, strict=True):
        image[tiles:] = 0
    return [tokens for *_, tokens in chosen], {
        "pixel_values": values,
        "image_sizes": torch.tensor([image for image, *_ in chosen]),
    }


def _split(number: int, generator: torch.Generator) -> tuple[list[int], dict[str, torch.Tensor]]:
    """A row of tiles, as the processor makes of one text; behind a single image one that does not count."""
    tiles = sum((1, 3, 5)[int(torch.randint(3, (), generator=generator))] for _ in range(number))
    more, size = int(number == 1), SPLIT["image_size"]
    values = _normal(1, tiles + more, 3, size, size, generator=generator)
    counts = torch.ones(1, tiles + more, size, size, dtype=torch.int64)
    values[:, tiles:], counts[:, tiles:] = 0, 0
    return [4] * tiles, {"pixel_values": values, "pixel_attention_mask": counts}


def _clips(number: int, generator: torch.Generator) -> tuple[list[int], dict[str, torch.Tensor]]:
    """16 frames each, silence included; of two embeddings or more, as by one alone transformers expects old inputs."""
    frames = torch.randint(9, 17, (number,), generator=generator)
    features = _normal(number, AUDIO["num_mel_bins"], 16, generator=generator)
    return (((frames - 1) // 2 - 1) // 2 + 1).tolist(), {
        "input_features": features,
        "feature_attention_mask": (torch.arange(16) < frames[:, None]).int(),
    }


def _normal(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


ITEMS = {kind: Items(make=_tiles if "next" in kind else _images) for kind in MODELS if kind.startswith("llava")}
ITEMS |= {kind: Items(make=_grids, before=(VISION_START,)) for kind in ("qwen2_vl", "qwen2_5_vl")}
ITEMS |= {kind: Items(make=_split) for kind in ("idefics3", "smolvlm")}
ITEMS["qwen2_audio"] = Items(make=_clips, module="audio", encoder="encoder")
UNDIVIDED = ("llava_dinov2", "qwen2_audio", "qwen2_vl", "qwen2_5_vl")
"""Models whose vision encoder is taken from transformers as it is."""


def save_model(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Write one of MODELS into a folder, every weight and bias different from what it is initialized with.

    Args:
        kind: which.
        folder: is made.
        dtype: of the files.
        options: of ``save_pretrained``.
    """
    torch.manual_seed(7)
    model = MODELS[kind]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.1))
    model.save_pretrained(folder, **options)
    return folder

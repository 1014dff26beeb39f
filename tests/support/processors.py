"""Tiny processors of transformers, made here, and images for them. No network, no files of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As that of LLaVA-1.5: what the assistant says is marked."""

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'audio' %}{{ '<|audio_bos|><|AUDIO|><|audio_eos|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As that of Qwen2-VL: nothing is marked."""

QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
AUDIO_TOKENS = ["<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
TEXT = "What is in the image? A cat and a dog on a table, two of them. USER: ASSISTANT: Yes, there are three."


# Version 4 wants a tokenizer of the right class, and says less of what it puts for images.
IS_5 = int(transformers.__version__.partition(".")[0]) >= 5


def tokenizer(
    special: list[str], *, begins: bool = False, template: str | None = None, kind: str = "PreTrainedTokenizerFast"
) -> Any:
    """A byte-level BPE of at most 400 tokens; 0, 1 and 2 are padding, begin and end.

    Args:
        special: further tokens, from 3 on.
        begins: put the begin before every text, as Llama's does.
        template: its chat template.
        kind: its class in version 4 of transformers.
    """
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>", *special], initial_alphabet=sorted(alphabet)
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return getattr(transformers, "PreTrainedTokenizerFast" if IS_5 else kind)(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )


def llava(*, size: int = 16, template: str | None = LLAVA_TEMPLATE, image_processor: Any = None) -> Any:
    """LLaVA-1.5's, with patches of 8 pixels and the class token left out."""
    images = image_processor or transformers.CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return transformers.LlavaProcessor(
        images,
        tokenizer(["<image>"], begins=True),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def llava_next(resolutions: Sequence[Sequence[int]] = ((16, 32), (32, 16), (32, 32), (48, 16))) -> Any:
    """LLaVA-NeXT's: tiles of 16 pixels."""
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=[list(each) for each in resolutions],
    )
    return transformers.LlavaNextProcessor(
        images,
        tokenizer(["<image>"], begins=True),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


def qwen(kind: str = "Qwen2VL", *, patch_size: int = 7) -> Any:
    """Qwen2-VL's or, with ``"Qwen2_5_VL"``, Qwen2.5-VL's."""
    size = {"shortest_edge": (2 * patch_size) ** 2 * 4, "longest_edge": (2 * patch_size) ** 2 * 16}
    options = {"size": size, "patch_size": patch_size, "merge_size": 2}
    return getattr(transformers, f"{kind}Processor")(
        transformers.Qwen2VLImageProcessor(**options),
        tokenizer(QWEN_TOKENS, kind="Qwen2TokenizerFast"),
        transformers.Qwen2VLVideoProcessor(**options),
        chat_template=CHATML_TEMPLATE,
    )


def idefics3() -> Any:
    """Idefics3's: an image becomes tiles of 16 pixels, between which there is text, too."""
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 48}, max_image_size={"longest_edge": 16})
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]
    return transformers.Idefics3Processor(
        images, tokenizer(special, begins=True), image_seq_len=4, chat_template=LLAVA_TEMPLATE
    )


def qwen_audio() -> Any:
    """Qwen2-Audio's, with sounds of at most a second."""
    sounds = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return transformers.Qwen2AudioProcessor(
        sounds, tokenizer(AUDIO_TOKENS, kind="Qwen2TokenizerFast"), chat_template=CHATML_TEMPLATE
    )


def image(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)

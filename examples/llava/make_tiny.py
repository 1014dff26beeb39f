"""A tiny LLaVA with random weights, and pictures to train it on: what `configs/tiny_llava.yaml` needs.

    uv run --extra hf python -m examples.llava.make_tiny data/tiny_llava

`OUT/model` is a folder as of the Hugging Face hub: config, safetensors, tokenizer, image processor. `OUT/train.jsonl`,
`OUT/val.jsonl` and `OUT/images` are questions about the colour of a picture, in LLaVA's format. Nothing is downloaded,
and every run writes the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "white": (235, 235, 235)}
QUESTION = "What colour is it?"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
IMAGE_SIZE, PATCH_SIZE = 16, 8
SAMPLES = {"train": 1024, "val": 32}
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "ASSISTANT: {% generation %}{{ message['content'][0]['text'] }}</s>{% endgeneration %}"
    "{% else %}USER: {% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for every word that occurs."""
    words = dict.fromkeys([*SPECIAL, *f"USER: <image> {QUESTION} ASSISTANT:".split(), *COLOURS])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(folder: Path) -> None:
    """Write the model with its tokenizer and processor."""
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=32,
        initializer_factor=10.0,  # the features of a ViT as small as this would hardly differ otherwise
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side),
        tokenizer=make_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token
        chat_template=_TEMPLATE,
    ).save_pretrained(folder)


def make_data(folder: Path) -> None:
    """Write pictures, and for each the question for its colour with the answer."""
    numbers = np.random.default_rng(1)
    (folder / "images").mkdir()
    for split, number in SAMPLES.items():
        with (folder / f"{split}.jsonl").open("w") as lines:
            for index in range(number):
                name, colour = list(COLOURS.items())[index % len(COLOURS)]
                pixels = np.array(colour) + numbers.integers(-20, 21, (IMAGE_SIZE, IMAGE_SIZE, 3))
                file = f"images/{split}-{index:04d}.png"
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / file)
                turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": name}]
                lines.write(json.dumps({"image": file, "conversations": turns}) + "\n")


def main() -> None:
    """Write everything into the folder of the command line, which must not exist."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m examples.llava.make_tiny OUT")
    folder = Path(sys.argv[1])
    if folder.exists():
        sys.exit(f"{folder} exists already; remove it first, or choose another name.")
    folder.mkdir(parents=True)
    make_model(folder / "model")
    make_data(folder)
    print(f"{folder}/model: a LLaVA; {folder}: {' and '.join(f'{n} samples to {s}' for s, n in SAMPLES.items())}")


if __name__ == "__main__":
    main()

"""Asks a LLaVA in transformers about an image: whether what was exported is a model as any other.

uv run --extra hf python -m examples.llava.answer FOLDER IMAGE "What colour is it?"
"""

from __future__ import annotations

import sys

from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration


def main() -> None:
    """Print the answer to the question of the command line."""
    if len(sys.argv) != 4:
        sys.exit('usage: python -m examples.llava.answer FOLDER IMAGE "QUESTION"')
    folder, image, question = sys.argv[1:]
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=Image.open(image).convert("RGB"), text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].size(1) :]
    print(processor.decode(tokens, skip_special_tokens=True))


if __name__ == "__main__":
    main()

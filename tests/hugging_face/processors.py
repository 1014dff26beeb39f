"""Parts of processors: a tokenizer of a few words, and image processors that need Pillow alone."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit


def word_tokenizer(*words: str) -> transformers.PreTrainedTokenizerFast:
    """One token for each word; those in angle brackets need no space around them."""
    known = ["<pad>", "<unk>", *words]
    tokenizer = Tokenizer(WordLevel({word: token for token, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([word for word in known if word.startswith("<")])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def image_processor(family: str) -> Any:
    """The class that does not need torchvision."""
    name = f"{family}ImageProcessor"
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)  # the latter in transformers 4

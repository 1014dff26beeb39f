"""The folder of a pretrained model: its config, and what has to fit it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from lightning_mimo.errors import ConfigError

INSTALL = "pip install 'lightning-mimo[hf]'"


def require_transformers() -> None:
    """
    Raises:
        ConfigError: if transformers is not installed, with the command.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(f"Pretrained models need the package transformers, which is not installed: {INSTALL}")


def read_config(folder: Path) -> Any:
    """The config of a pretrained model, of transformers' own class for it. Code in the folder is never run.

    Raises:
        ConfigError: if transformers is missing, or the folder is none of a model that it knows.
    """
    require_transformers()
    from transformers import AutoConfig

    if not folder.is_dir():
        raise ConfigError(
            f"pretrained={str(folder)!r} is no folder. Give the folder of a model that has been downloaded, such as by "
            f"'hf download llava-hf/llava-1.5-7b-hf --local-dir FOLDER'."
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"pretrained={str(folder)!r} is no folder of a model: there is no config.json.")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Refuse a tokenizer that makes token ids which the model has no embeddings for.

    Raises:
        ConfigError: with both numbers.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    content = json.loads(file.read_text())
    vocabulary = content.get("model", {}).get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    largest = max([*ids, *(token["id"] for token in content.get("added_tokens", []))], default=-1)
    if largest >= vocab_size:
        raise ConfigError(
            f"{file} has token ids up to {largest}, but the model has embeddings for 0 to {vocab_size - 1} "
            f"(vocab_size={vocab_size} in config.json). Resize the embeddings with transformers "
            f"(model.resize_token_embeddings({largest + 1})) and save the model again."
        )

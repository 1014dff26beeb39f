"""Finds the folder of a pretrained model: a folder on disk, or a model of the Hugging Face hub, which is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_mimo.errors import ConfigError
from lightning_mimo.models.hugging_face.folder import require_transformers

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Configuration, tokenizer, processor and weights; no code, no pickles and no weights of other frameworks.
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def folder_of(pretrained: str | Path) -> Path:
    """The folder of a model, downloaded if it is not there; a second call takes it from the hub's cache.

    Processes that call this at the same time download once: the hub's package locks each file.

    Args:
        pretrained: a folder, or the id of a model of the hub such as ``llava-hf/llava-1.5-7b-hf``.

    Raises:
        ConfigError: if it is neither.
    """
    path = Path(pretrained)
    if path.is_dir() or not _ID.fullmatch(str(pretrained)):
        return path  # read_config() says what is wrong with it
    require_transformers()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(pretrained), allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"pretrained={str(pretrained)!r} is no folder, and no model of this name could be downloaded from the "
            f"Hugging Face hub: {' '.join(str(error).split())[:300]}"
        ) from error

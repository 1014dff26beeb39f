"""Paths of checkpoints: folders of a file system that all ranks see. Remote stores are refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import lightning.pytorch as pl

from lightning_mimo.errors import ConfigError

_PROTOCOL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)(::|://)")


def local_path(path: object) -> Path:
    """Return the path of a folder or file; ``file:///data/run`` is ``/data/run``.

    Raises:
        ConfigError: for the address of a remote store, such as ``s3://bucket/run``.
    """
    text = str(path)
    found = _PROTOCOL.match(text)
    if found is None:
        return Path(text)
    if found.group() in ("file://", "local://"):
        return Path(text.removeprefix(found.group()))
    raise ConfigError(
        f"{text!r} is in a remote store ({found.group(1)}), but all ranks of MimoStrategy write a checkpoint together "
        f"into a folder. Give a folder that all nodes mount, and copy finished checkpoints to the store."
    )


def check_paths(trainer: pl.Trainer) -> None:
    """Refuse a Trainer whose checkpoints would be written into a remote store.

    Raises:
        ConfigError: naming the argument and the address.
    """
    for callback in trainer.checkpoint_callbacks:
        folder = getattr(callback, "dirpath", None)
        if folder is not None:
            _check(f"{type(callback).__name__}(dirpath=...)", folder)
    if trainer.checkpoint_callbacks:
        _check("Trainer(default_root_dir=...)", trainer.default_root_dir)


def _check(argument: str, folder: object) -> None:
    try:
        path = local_path(folder)
    except ConfigError as error:
        raise ConfigError(f"{argument}: {error}") from None
    # Lightning itself takes file:///data for a relative path.
    if "file:" in path.parts or str(folder).startswith(("file:", "local:")):
        raise ConfigError(f"{argument}: {str(folder)!r}: write the folder without file://.")

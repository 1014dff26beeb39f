"""``--trainer.default_root_dir=X`` moves logs and checkpoints that a config puts into its default_root_dir."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_mimo.commands.layout import read_yaml

_FOLDERS = ("save_dir", "dirpath")  # of loggers, and of ModelCheckpoint


def follow_root_dir(trainer: Namespace, config_files: Iterable[str]) -> None:
    """Move folders of loggers and checkpoints that lie in the config files' default_root_dir to the one that counts.

    A logger must be told its folder, so a config names the same one twice; given on the command line, the second would
    stay behind. A folder elsewhere, and one that is given on the command line itself, stays what it is.

    Args:
        trainer: the parsed arguments of the Trainer; changed in place.
        config_files: paths of the config files, in the order given.
    """
    roots = [(read_yaml(path).get("trainer") or {}).get("default_root_dir") for path in config_files]
    before = next((root for root in reversed(roots) if root is not None), None)
    after = trainer.default_root_dir
    if before is None or after is None or str(before) == str(after):
        return
    for arguments in _arguments_of([trainer.logger, trainer.callbacks]):
        for name in _FOLDERS:
            folder = arguments.get(name)
            if folder is not None and Path(os.path.normpath(folder)).is_relative_to(os.path.normpath(before)):
                arguments[name] = os.path.normpath(Path(after) / os.path.relpath(folder, before))


def _arguments_of(value: Any) -> Iterator[Namespace]:
    """Arguments of all classes that are written as ``class_path`` and ``init_args``, also in lists."""
    if isinstance(value, list):
        for each in value:
            yield from _arguments_of(each)
    elif isinstance(value, Namespace) and isinstance(value.get("init_args"), Namespace):
        yield value.init_args

"""Makes ``--trainer.default_root_dir=X`` also move the logs and checkpoints that a config puts in that folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_mimo.commands.yaml_file import read_yaml

_FOLDERS = ("save_dir", "dirpath")  # of loggers, and of ModelCheckpoint


def follow_root_dir(trainer: Namespace, config_files: Iterable[str]) -> None:
    """Move folders of loggers and checkpoints from the default_root_dir of the config files to the final one.

    A logger needs a ``save_dir``, so a config names the same folder twice, and ``--trainer.default_root_dir`` changes
    only one of the two. Folders outside the default_root_dir of the config files, for instance those given on the
    command line, are not changed.

    Args:
        trainer: parsed arguments of the Trainer; changed in place.
        config_files: paths of the config files, in the order of the command line.
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
    """Yield the ``init_args`` of all classes that are given by ``class_path``, also within lists."""
    if isinstance(value, list):
        for each in value:
            yield from _arguments_of(each)
    elif isinstance(value, Namespace) and isinstance(value.get("init_args"), Namespace):
        yield value.init_args

"""A model as a folder that others can load: the source's names, shapes, dtypes and companion files, our weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch

from lightning_mimo.errors import CheckpointError, ConfigError
from lightning_mimo.weights.files import (
    INDEX,
    SINGLE,
    SafetensorsFolder,
    companions,
    copy_files,
    split,
    write_file,
    write_index,
)
from lightning_mimo.weights.rules import RuleTable


def export_folder(
    table: RuleTable,
    whole: Callable[[str], torch.Tensor],
    *,
    source: SafetensorsFolder,
    out: Path,
    max_shard_bytes: int | None = None,
) -> int:
    """Write a folder in which everything is as in the source but the numbers. Holds one file in memory at a time.

    Args:
        table: the rules by which the source was read.
        whole: parameter's global name -> its values, unsharded.
        source: the folder that the model started from. What the model had no use for is copied from it; tensors that
            it lacks are added in the dtype of its first.
        out: is made; must not exist, or be an empty folder.
        max_shard_bytes: of one file; ``None`` divides tensors over files as the source does.

    Returns:
        How many tensors.

    Raises:
        ConfigError: if ``out`` holds something, or the source does not fit the rules.
        CheckpointError: if ``out`` cannot be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists already; remove it first, or choose another name.")
    shapes = source.shapes()
    table.check_files(shapes, where=str(source.path), is_optional=lambda name: True)
    new = {name: shape for name, shape in table.sources.items() if name not in shapes}
    dtypes = {name: source.dtype(name) for name in shapes}
    dtypes |= dict.fromkeys(new, next(iter(dtypes.values())))
    sizes = {name: prod(shape) * dtypes[name].itemsize for name, shape in {**shapes, **new}.items()}
    last = max(source.file_of.values())
    file_of = {**source.file_of, **dict.fromkeys(new, last)}
    if max_shard_bytes is not None:
        file_of = split(sizes, max_shard_bytes)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        copy_files(companions(source.path), unfinished)
        for file in sorted(set(file_of.values())):
            tensors = {
                name: source.whole(name) if table.is_kept(name) else table.gather(name, whole).to(dtypes[name])
                for name, own_file in file_of.items()
                if own_file == file
            }
            write_file(unfinished / file, tensors, source.metadata(source.file_of.get(next(iter(tensors)), last)))
        _write_index(source, unfinished, file_of, total_size=sum(sizes.values()))
    except OSError as error:
        raise CheckpointError(f"{out} could not be written: {error}.") from error
    unfinished.rename(out)
    return len(file_of)


def _write_index(source: SafetensorsFolder, out: Path, file_of: dict[str, str], *, total_size: int) -> None:
    if file_of == source.file_of and (source.path / INDEX).is_file():
        copy_files([source.path / INDEX], out)
    elif set(file_of.values()) != {SINGLE}:
        write_index(out, file_of, total_size=total_size)

"""Layout of a checkpoint directory, its integrity checks, and atomic replacement of an older checkpoint.

    step=600.ckpt/
      checkpoint.json                       manifest: layout, parameters, size and checksum of every other file; last
      trainer.pt                            state of Lightning (loops, callbacks, schedulers); plain types only
      images-rank00000.safetensors          shards of weights and optimizer state of one module on one rank
      language-rank00002.safetensors

While a checkpoint is being written it is in the folder ``unfinished`` beside its final path. A checkpoint is complete
if it has a manifest. Reading executes no code from any file: JSON, safetensors and ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_mimo.errors import CheckpointError

MANIFEST = "checkpoint.json"
TRAINER = "trainer.pt"
FORMAT = 1
_UNFINISHED = "unfinished"
_BLOCK = 1 << 22
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100


def unfinished(path: Path) -> Path:
    """Path at which a checkpoint is written before it is complete."""
    return path.parent / _UNFINISHED / path.name


def describe_file(path: Path) -> dict[str, int]:
    """Size in bytes and CRC-32 of a file, for the manifest."""
    checksum = size = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": checksum}


def flush(path: Path) -> None:
    """Flush a file or a directory to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically: other processes see the complete file or none."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.rename(path)


def publish(path: Path) -> None:
    """Move a complete checkpoint to its final path atomically, replacing an older one.

    If the process is killed meanwhile, the path holds the complete old or the complete new checkpoint.
    """
    new = unfinished(path)
    flush(new / MANIFEST)
    flush(new)
    if not path.exists():
        path.unlink(missing_ok=True)  # a dangling symbolic link
        new.rename(path)
    elif path.is_symlink() or path.is_file():
        path.unlink()
        new.rename(path)
    else:
        _exchange(new, path)
        shutil.rmtree(new)
    flush(path.parent)
    _remove_if_empty(new.parent)


def discard(path: Path) -> None:
    """Remove a checkpoint, or a symbolic link to one.

    It is moved to ``unfinished`` first, so that a partly deleted checkpoint cannot be mistaken for a complete one.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        aside = unfinished(path)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)
        shutil.rmtree(aside)
        _remove_if_empty(aside.parent)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()  # fails while another checkpoint is being written


def _exchange(one: Path, two: Path) -> None:
    """Swap two directories, atomically if the system supports it (Linux with most file systems)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        done = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE) == 0
    except AttributeError:
        done = False
    if not done:
        aside = two.with_name(two.name + ".replaced")
        shutil.rmtree(aside, ignore_errors=True)
        two.rename(aside)
        one.rename(two)
        aside.rename(one)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: if the path is not a checkpoint, or it is incomplete or has an unsupported format.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a checkpoint of lightning-mimo: there is no such directory.")
    if not (path / MANIFEST).is_file():
        hint = "it was not written completely" if path.parent.name == _UNFINISHED else f"it has no {MANIFEST}"
        raise CheckpointError(f"{path} is not a checkpoint of lightning-mimo: {hint}.")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except ValueError as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error}.") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')!r}, but this version of lightning-mimo reads format {FORMAT}. "
            f"It was written by version {manifest.get('lightning_mimo')}."
        )
    return manifest


def damaged_files(path: Path, manifest: Mapping[str, Any], *, rank: int, ranks: int) -> Iterator[str]:
    """Yield the problems of this rank's share of the files. All ranks together check each file once."""
    for name, expected in sorted(manifest["files"].items())[rank::ranks]:
        if not (path / name).is_file():
            yield f"{name} is missing"
        elif (found := describe_file(path / name)) != {"bytes": expected["bytes"], "crc32": expected["crc32"]}:
            yield (
                f"{name} has {found['bytes']} bytes with checksum {found['crc32']:08x}, but was written with "
                f"{expected['bytes']} bytes and {expected['crc32']:08x}"
            )

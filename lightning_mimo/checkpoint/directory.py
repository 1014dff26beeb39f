"""Files of a checkpoint directory, and the checks of their integrity.

    step=600.ckpt/
      checkpoint.json                       manifest: layout, parameters, size and checksum of every file; written last
      trainer.pt                            state of Lightning (loops, callbacks, schedulers); plain types only
      images-rank00000.safetensors          shards of weights and optimizer state of one module on one rank
      language-rank00002.safetensors

A checkpoint is complete if it has a manifest. Only the files that the manifest lists are read, and only files with the
names above are ever removed. Reading executes no code from any file: JSON, safetensors and
``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_mimo.checkpoint.manifest import FileEntry, Manifest, manifest_from, manifest_text
from lightning_mimo.errors import CheckpointError

MANIFEST = "checkpoint.json"
TRAINER = "trainer.pt"
OWNER = "owner.json"
UNFINISHED = "unfinished"
"""Folder beside the checkpoints in which they are written before they are complete."""
_SHARDS = re.compile(r"(?P<module>[^\W\d]\w*)-rank\d{5,}\.safetensors")
_TEMPORARY = re.compile(r"(rank\d{5,}\.(writing|written|failed)|owner\.json|checkpoint\.json)(\.part)?")
_BLOCK = 1 << 22
_LARGEST_MANIFEST = 1 << 28  # bytes; that of a run with 1,000 ranks and 10,000 parameters has 2 MB


def file_name(module: str, rank: int) -> str:
    """Name of the file with a rank's shards of a module, such as ``images-rank00000.safetensors``."""
    name = f"{module}-rank{rank:05d}.safetensors"
    assert module_of_file(name) == module, "names of modules are identifiers"
    return name


def module_of_file(name: str) -> str | None:
    """Module whose shards are in a file of this name; ``None`` for all other files."""
    found = _SHARDS.fullmatch(name)
    return None if found is None else found["module"]


def describe_file(path: Path) -> FileEntry:
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
    _write_text(path, json.dumps(content, indent=1))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint, with its own checksum, atomically."""
    _write_text(directory / MANIFEST, manifest_text(manifest))


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.rename(path)


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a checkpoint and check all its fields.

    Raises:
        CheckpointError: if the path is not a checkpoint, or it is incomplete, damaged or has an unsupported format.
    """
    try:
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a checkpoint of lightning-mimo: {_what_is_there(path)}.")
        file = path / MANIFEST
        if not file.is_file():
            hint = "it was not written completely" if path.parent.name == UNFINISHED else f"it has no {MANIFEST}"
            raise CheckpointError(f"{path} is not a checkpoint of lightning-mimo: {hint}.")
        if (size := file.stat().st_size) > _LARGEST_MANIFEST:
            raise CheckpointError(f"{file} is damaged: it has {size:,} bytes, too many for a manifest.")
        return manifest_from(file.read_bytes(), file)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _what_is_there(path: Path) -> str:
    return "it is not a directory" if os.path.lexists(path) and path.exists() else "there is no such directory"


def damaged_files(path: Path, manifest: Manifest, *, rank: int, ranks: int) -> Iterator[str]:
    """Yield the problems of this rank's share of the files. All ranks together check each file once.

    Rank 0 also reports files that the manifest does not list.
    """
    for name, expected in sorted(manifest["files"].items())[rank::ranks]:
        file = path / name
        if not file.is_file():
            yield f"{name} is missing" + (", or not a regular file" if os.path.lexists(file) else "")
        elif (size := file.stat().st_size) != expected["bytes"]:  # before reading a file of any size
            yield f"{name} has {size} bytes, but was written with {expected['bytes']} bytes"
        elif (found := describe_file(file)) != expected:
            yield (
                f"{name} has {found['bytes']} bytes with checksum {found['crc32']:08x}, but was written with "
                f"{expected['bytes']} bytes and {expected['crc32']:08x}"
            )
    if rank == 0:
        # Hidden files, which file systems and file managers create, are never read.
        listed = {MANIFEST, *manifest["files"]}
        for name in sorted(entry.name for entry in path.iterdir()):
            if name not in listed and not name.startswith("."):
                yield f"it contains {name!r}, which its manifest does not list; move it elsewhere"


def foreign_entry(directory: Path) -> str | None:
    """Name of an entry of a directory that lightning-mimo does not write; ``None`` if there is none."""
    for entry in sorted(directory.iterdir()):
        name = entry.name
        known = name == TRAINER or module_of_file(name) is not None or _TEMPORARY.fullmatch(name)
        if not known or not stat.S_ISREG(entry.lstat().st_mode):
            return name
    return None


def remove_directory(directory: Path) -> None:
    """Remove a directory with the files of a checkpoint, complete or not. A concurrent removal is no error.

    Raises:
        CheckpointError: if it contains anything else. Nothing is removed then.
    """
    try:
        if (name := foreign_entry(directory)) is not None:
            raise CheckpointError(f"{directory} is not removed: it contains {name!r}, which is not of a checkpoint.")
        for entry in directory.iterdir():
            entry.unlink(missing_ok=True)
        directory.rmdir()
    except FileNotFoundError:
        pass

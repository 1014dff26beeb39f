"""Writes tar shards in the form of webdataset."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_tar(file: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]], *, compression: str = "") -> Path:
    """Write a shard; samples are pairs of a name and a mapping from endings to contents."""
    mode = f"w:{compression}"
    with tarfile.open(file, mode) as archive:  # type: ignore[call-overload]  # a mode that is put together
        for key, files in samples:
            for ending, content in files.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return file

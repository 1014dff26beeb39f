"""Tar shards in webdataset's form: consecutive files of one name are a sample, their endings its fields."""

from __future__ import annotations

import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_mimo.data.streams.files import shard_files
from lightning_mimo.data.streams.records import Record, ShardNumbers
from lightning_mimo.errors import ConfigError, DataError

_OPEN_FILES = 16  # per process
_INDEX_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """Where the samples of one shard are. Numbers in arrays, which forked workers share.

    Attributes:
        keys: name of each sample, bytes ``[samples]``.
        begins: number of its first file, int64 ``[samples + 1]``; the last is the number of files.
        fields: the endings that occur, bytes ``[n]``.
        field: ending of each file, int32 ``[files]``, as number in ``fields``.
        offsets: where its bytes begin, int64 ``[files]``.
        sizes: how many there are, int64 ``[files]``.
    """

    keys: np.ndarray
    begins: np.ndarray
    fields: np.ndarray
    field: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    @classmethod
    def read(cls, file: Path) -> TarIndex:
        """Read the headers of all files in a shard; their contents are skipped.

        Raises:
            DataError: if it is no uncompressed tar file, or a sample has two files of the same ending.
        """
        keys: list[str] = []
        field: list[int] = []
        begins, offsets, sizes = [0], [], []
        numbers: dict[str, int] = {}
        for member in _members(file):
            key, ending = split_name(member.name)
            if not ending or Path(key).name.startswith("__"):
                continue  # no part of a sample, as webdataset has it
            number = numbers.setdefault(ending, len(numbers))
            if not keys or keys[-1] != key:
                keys.append(key)
                begins.append(begins[-1])
            elif number in field[begins[-2] :]:
                raise DataError(f"{file}, sample {key!r} has two files that end in .{ending}.")
            begins[-1] += 1
            field.append(number)
            offsets.append(member.offset_data)
            sizes.append(member.size)
        return cls(
            keys=np.array([key.encode() for key in keys], dtype=np.bytes_),
            begins=np.array(begins, np.int64),
            fields=np.array([name.encode() for name in numbers], dtype=np.bytes_),
            field=np.array(field, np.int32),
            offsets=np.array(offsets, np.int64),
            sizes=np.array(sizes, np.int64),
        )

    @classmethod
    def cached(cls, file: Path, folder: Path) -> TarIndex:
        """Read the index from a folder; make it and write it there if there is none of this very file."""
        stat = file.stat()
        identity = np.array([_INDEX_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)
        path = folder / f"{file.name}.index.npz"
        try:
            with np.load(path) as saved:
                if np.array_equal(saved["identity"], identity):
                    return cls(**{name: saved[name] for name in cls.__dataclass_fields__})
        except (OSError, ValueError, KeyError):
            pass  # none, or that of an unfinished or older run
        index = cls.read(file)
        written = folder / f"{file.name}.index.{os.getpid()}.npz"  # all ranks may write at the same time
        np.savez(written, identity=identity, **vars(index))
        written.replace(path)
        return index

    def __len__(self) -> int:
        return len(self.keys)


class TarRecord(Record):
    """A sample of a tar shard: ending of a file -> its bytes. ``open`` reads less than all of them."""

    def __init__(self, file: Path, index: TarIndex, number: int, opened: OpenFiles) -> None:
        self.file, self._opened = file, opened
        self.key = index.keys[number].decode()
        """Name that the files of the sample share."""
        files = slice(index.begins[number], index.begins[number + 1])
        names = [index.fields[each].decode() for each in index.field[files]]
        places = zip(index.offsets[files].tolist(), index.sizes[files].tolist(), strict=True)
        self._places = dict(zip(names, places, strict=True))

    @property
    def where(self) -> str:
        return f"{self.file}, sample {self.key!r}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, field: str) -> bytes:
        offset, size = self._places[field]
        found = self._opened.read(self.file, offset, size)
        if len(found) < size:
            raise DataError(f"{self.where}, {field}: the file ends after {len(found)} of {size} bytes: it is cut off.")
        return found

    def open(self, field: str) -> io.BufferedReader:
        """The file with an ending, for reading: of an image, say, the header alone."""
        offset, size = self._places[field]
        return io.BufferedReader(_Part(self._opened, self.file, offset, size))

    def field_of(self, name: str) -> str | None:
        """The ending that a name in a row stands for: itself, or after the name of the sample; ``None`` for others."""
        key, ending = split_name(name)
        if name in self._places:
            return name
        return ending if ending in self._places and Path(key).name == Path(self.key).name else None


class TarRecords:
    """All samples of tar shards."""

    def __init__(self, shards: str | Path | Sequence[str | Path], *, index_folder: str | Path | None = None) -> None:
        """
        Args:
            shards: as for :func:`shard_files`.
            index_folder: where to keep the index of each shard for the next run; ``None`` reads the headers every time.

        Raises:
            ConfigError: if a file or the folder is missing, or no shard holds a sample.
            DataError: if a file cannot be read.
        """
        self._files = shard_files(shards, kind="tar")
        folder = None if index_folder is None else Path(index_folder)
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"index_folder={str(index_folder)!r}: there is no such folder. Make it beforehand.")
        if folder is not None and len({file.name for file in self._files}) < len(self._files):
            raise ConfigError("index_folder=... needs shards of different names, and two have the same one.")
        self._indices = [
            TarIndex.read(file) if folder is None else TarIndex.cached(file, folder) for file in self._files
        ]
        self._numbers = ShardNumbers([len(index) for index in self._indices])
        self._opened = OpenFiles()
        if not len(self):
            raise ConfigError(f"The tar shards hold no sample: {', '.join(map(str, self._files[:3]))}.")

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def files(self) -> Sequence[Path]:
        return self._files

    @property
    def shard_lengths(self) -> Sequence[int]:
        return self._numbers.lengths

    def record(self, index: int) -> TarRecord:
        shard, number = self._numbers.find(index)
        return TarRecord(self._files[shard], self._indices[shard], number, self._opened)


class OpenFiles:
    """The files that were read last, kept open. Forked workers may share them: a read says where it begins."""

    def __init__(self) -> None:
        self._opened: OrderedDict[Path, int] = OrderedDict()

    def read(self, file: Path, offset: int, size: int) -> bytes:
        descriptor = self._opened.pop(file, None)
        if descriptor is None:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        self._opened[file] = descriptor
        if len(self._opened) > _OPEN_FILES:
            os.close(self._opened.popitem(last=False)[1])
        return os.pread(descriptor, size, offset)

    def __getstate__(self) -> dict[str, object]:
        return {"_opened": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._opened.values():
            os.close(descriptor)


class _Part(io.RawIOBase):
    """Some consecutive bytes of a file, as a file."""

    def __init__(self, opened: OpenFiles, file: Path, offset: int, size: int) -> None:
        self._opened, self._file = opened, file
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def readinto(self, buffer) -> int:  # any writable buffer
        size = max(min(len(buffer), self._size - self._position), 0)
        found = self._opened.read(self._file, self._offset + self._position, size) if size else b""
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)


def split_name(name: str) -> tuple[str, str]:
    """``"a/b.left.JPG"`` -> ``("a/b", "left.jpg")``, as webdataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _members(file: Path) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(file, "r:") as archive:
            yield from (member for member in archive if member.isfile())
    except tarfile.TarError as error:
        raise DataError(
            f"{file} cannot be read as an uncompressed tar file: {error}. A compressed one must be unpacked and packed "
            f"again without compression: only then a sample can be read without all that stand before it."
        ) from error

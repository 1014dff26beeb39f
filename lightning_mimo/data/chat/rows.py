"""Rows of conversations: JSON, parquet, tar shards, a dataset of Hugging Face, or any sequence of dicts."""

from __future__ import annotations

import dataclasses
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Protocol

from lightning_mimo.data.packages import require
from lightning_mimo.data.streams.files import expand_braces, matching_files
from lightning_mimo.data.streams.parquet import ParquetRecords
from lightning_mimo.data.streams.sampler import SHARDS_AT_ONCE
from lightning_mimo.data.streams.tar import OpenFiles, TarRecord, TarRecords
from lightning_mimo.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row, as it was written.

    Attributes:
        value: its fields.
        where: file and row, for messages.
        folder: to which paths of images and the like are relative.
        files: of a row in a tar shard, the files beside it, which are looked for before those on disk.
    """

    value: Mapping[str, Any]
    where: str
    folder: Path
    files: TarRecord | None = None


class Rows(Protocol):
    """Rows that can be read in any order."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Row:
        """One row; raises DataError if it cannot be read."""


def open_rows(source: object, *, shards_at_once: int = SHARDS_AT_ONCE) -> Rows:
    """Open rows for reading.

    Args:
        source: path of a ``.jsonl``, ``.json`` (a list), ``.parquet`` or ``.tar`` file, or of a folder of
            ``datasets.Dataset.save_to_disk``; a pattern with ``*`` or ``{000..127}``; a list of these, which are read
            one after another; a ``datasets.Dataset``; or any sequence of dicts.
        shards_at_once: row groups of parquet files that a process keeps in memory.

    Raises:
        ConfigError: if there is no such file, it is of another kind, or a package is missing.
        DataError: if the file cannot be read.
    """
    if isinstance(source, str | Path):
        source = [source]
    if isinstance(source, list | tuple) and source and all(isinstance(each, str | Path) for each in source):
        return _open_paths([path for each in source for path in _matching(str(each))], shards_at_once)
    if _is_of_datasets(source):
        return HuggingFaceRows(source)
    if isinstance(source, Mapping) or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise ConfigError(
            f"Rows of conversations are a {type(source).__name__}, but must be a path, a datasets.Dataset or a "
            f"sequence of dicts."
        )
    return SequenceRows(source)  # type: ignore[arg-type]  # it has what a sequence needs


class SequenceRows:
    """Rows in memory, or of any object with ``__len__`` and ``__getitem__``. Paths in them start where Python does."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], where: str = "", folder: Path | None = None) -> None:
        self._rows = rows
        self._where = where
        self._folder = folder or Path()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Row:
        where = f"{self._where}row {index}"
        return Row(value=_as_row(self._rows[index], where), where=where, folder=self._folder)


class JsonLines:
    """A file with one JSON object a line. Only where the lines begin is kept in memory; empty lines do not count."""

    def __init__(self, file: Path, opened: OpenFiles) -> None:
        """
        Args:
            file: is read here once, to find the lines.
            opened: keeps it open.
        """
        self._file = file
        self._folder = file.parent
        self._opened = opened
        self._begins: list[int] = []
        self._lines: list[int] = []
        begin = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    self._begins.append(begin)
                    self._lines.append(number)
                begin += len(line)
        self._end = begin

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, index: int) -> Row:
        where = f"{self._file}, row {index} (line {self._lines[index]})"
        begin = self._begins[index]
        end = self._begins[index + 1] if index + 1 < len(self) else self._end
        text = self._opened.read(self._file, begin, end - begin)
        return Row(value=_as_row(_parse(text, where), where), where=where, folder=self._folder)


class ParquetRows:
    """Parquet files, of which a few row groups are in memory."""

    def __init__(self, files: Sequence[Path], *, groups_in_memory: int) -> None:
        self._records = ParquetRecords(files, groups_in_memory=groups_in_memory)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def shard_lengths(self) -> Sequence[int]:
        return self._records.shard_lengths

    def read(self, index: int) -> Row:
        record = self._records.record(index)
        return Row(value=record, where=record.where, folder=record.file.parent)


class TarRows:
    """Tar shards in webdataset's form: a row is a file that ends in ``.json``, and images are the files beside it.

    A row names them by their endings, or by their names; one that names none has all, in the order of the shard.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._records = TarRecords(files)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def shard_lengths(self) -> Sequence[int]:
        return self._records.shard_lengths

    def read(self, index: int) -> Row:
        record = self._records.record(index)
        if "json" not in record:
            raise DataError(f"{record.where}, has no .json file with the conversation, but the endings {list(record)}.")
        value = dict(_as_row(_parse(record["json"], f"{record.where}, json"), record.where))
        for kind, endings in _MEDIA.items():
            beside = [name for name in record if name.rpartition(".")[2] in endings]
            if beside and not _names_media(value, kind):
                value[f"{kind}s"] = beside
        return Row(value=value, where=record.where, folder=record.file.parent, files=record)


class HuggingFaceRows:
    """A ``datasets.Dataset``, of which images and sound are read as files, so that nothing is decoded early."""

    def __init__(self, dataset: Any, where: str = "", folder: Path | None = None) -> None:
        if not hasattr(dataset, "cast_column") or not hasattr(dataset, "__len__") or isinstance(dataset, Mapping):
            kind = type(dataset).__name__
            raise ConfigError(
                f"Rows of conversations are a {kind}, but every rank must be able to read any row. Give a "
                f"datasets.Dataset: one split of a DatasetDict, or an IterableDataset that has been saved."
            )
        for name, feature in (dataset.features or {}).items():
            if (undecoded := _undecoded(feature)) != feature:
                dataset = dataset.cast_column(name, undecoded)
        self._dataset = dataset.with_format(None)
        self._where = where
        self._folder = folder or Path()

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> Row:
        return Row(value=self._dataset[index], where=f"{self._where}row {index}", folder=self._folder)


class RowsTogether:
    """Several files, one after another."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    @property
    def shard_lengths(self) -> Sequence[int] | None:
        """Of parts that are read fast in any order, the whole is one shard; ``None`` if all parts are."""
        found = [shard_lengths_of(part) for part in self.parts]
        if all(lengths is None for lengths in found):
            return None
        return [length for part, lengths in zip(self.parts, found, strict=True) for length in lengths or [len(part)]]

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Row:
        part = bisect_right(self._ends, index)
        return self.parts[part].read(index - (self._ends[part - 1] if part else 0))


def shard_lengths_of(rows: Rows) -> Sequence[int] | None:
    """Rows of each shard, where rows are to be read shard by shard; ``None`` where any order is as good."""
    return getattr(rows, "shard_lengths", None)


def are_light(rows: Rows) -> bool:
    """Whether rows are read without the images in them: JSON and sequences in memory, not tables and archives."""
    if isinstance(rows, RowsTogether):
        return all(are_light(part) for part in rows.parts)
    return isinstance(rows, JsonLines | SequenceRows)


def _matching(path: str) -> list[Path]:
    found = [file for name in expand_braces(path) for file in matching_files(name)]
    if not found:
        raise ConfigError(f"There is no file that matches {path!r}.")
    return found


def _open_paths(paths: Sequence[Path], shards_at_once: int) -> Rows:
    """Files one after another; neighbours of one kind of shards together."""
    parts: list[Rows] = []
    opened = OpenFiles()
    for suffix, files in groupby(paths, key=lambda path: path.suffix if path.is_file() else None):
        if suffix == ".parquet":
            parts.append(ParquetRows(list(files), groups_in_memory=shards_at_once))
        elif suffix == ".tar":
            parts.append(TarRows(list(files)))
        elif suffix == ".jsonl":
            parts.extend(JsonLines(path, opened) for path in files)
        else:
            parts.extend(_open_path(path) for path in files)
    return parts[0] if len(parts) == 1 else RowsTogether(parts)


def _open_path(path: Path) -> Rows:
    if not path.exists():
        raise ConfigError(f"There is no file {str(path)!r} with conversations.")
    if path.is_dir():
        if not (path / "state.json").is_file():
            raise ConfigError(
                f"{str(path)!r} is a folder, but none of datasets.Dataset.save_to_disk: there is no state.json. Give "
                f"the files in it, such as '{path}/*.jsonl'."
            )
        datasets = require("datasets", what=f"The folder {path}", install="datasets")
        return HuggingFaceRows(datasets.load_from_disk(str(path)), f"{path}, ", path)
    if path.suffix != ".json":
        raise ConfigError(f"{str(path)!r} ends in {path.suffix!r}; conversations are in .jsonl, .json, .parquet, .tar.")
    return _json_list(path)


def _json_list(file: Path) -> Rows:
    rows = _parse(file.read_bytes(), str(file))
    if not isinstance(rows, list):
        raise DataError(
            f"{file} holds a {type(rows).__name__}, but must hold a list of rows. One row a line is .jsonl."
        )
    return SequenceRows(rows, f"{file}, ", file.parent)


_MEDIA = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    "audio": ("wav", "flac", "mp3", "ogg"),
}
"""Kind -> endings of its files in a tar shard."""


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # of the syntax, or of UTF-8
        raise DataError(f"{where} is no JSON: {error}") from error


def _as_row(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is a {type(value).__name__}, but must be a dict with 'messages' or 'conversations'.")
    return value


def _names_media(row: Mapping[str, Any], kind: str) -> bool:
    """Whether a row says itself which images it has, in a field or in a message."""
    if any(row.get(key) is not None for key in (kind, f"{kind}s")):
        return True
    messages = row.get("messages") or row.get("conversations") or ()
    contents = [message.get("content", message.get("value")) for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    of_kind = [part for part in parts if str(part.get("type")).removesuffix("_url") == kind]
    return bool(of_kind) and all(set(part) - {"type"} for part in of_kind)


def _is_of_datasets(source: object) -> bool:
    return any(kind.__module__.partition(".")[0] == "datasets" for kind in type(source).__mro__)


def _undecoded(feature: Any) -> Any:
    """A feature of ``datasets`` whose images and sounds come as ``{"bytes": ..., "path": ...}``."""
    if isinstance(feature, dict):
        return {name: _undecoded(each) for name, each in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(each) for each in feature]
    if dataclasses.is_dataclass(feature) and not isinstance(feature, type):
        if hasattr(feature, "feature"):  # a list
            return dataclasses.replace(feature, feature=_undecoded(feature.feature))
        if getattr(feature, "decode", None) is True:
            return dataclasses.replace(feature, decode=False)
    return feature

"""Parquet shards, read by row group and column: what is not looked at is not read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_mimo.data.packages import require
from lightning_mimo.data.streams.files import shard_files
from lightning_mimo.data.streams.records import Record, ShardNumbers
from lightning_mimo.errors import ConfigError, DataError


class ParquetRecord(Record):
    """A row of a parquet file: name of a column -> its value as a Python object."""

    def __init__(self, groups: _RowGroups, file: int, group: int, row: int, number: int) -> None:
        self._groups, self._file, self._group, self._row, self._number = groups, file, group, row, number

    @property
    def file(self) -> Path:
        return self._groups.files[self._file]

    @property
    def where(self) -> str:
        return f"{self.file}, row {self._number}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups.columns)

    def __len__(self) -> int:
        return len(self._groups.columns)

    def __contains__(self, column: object) -> bool:
        return column in self._groups.columns

    def __getitem__(self, column: str) -> Any:
        return self._groups.column(self._file, self._group, column)[self._row].as_py()


class ParquetRecords:
    """All rows of parquet files. A shard is a row group, of which the columns that are asked for are kept in memory."""

    def __init__(self, shards: str | Path | Sequence[str | Path], *, groups_in_memory: int = 4) -> None:
        """
        Args:
            shards: as for :func:`shard_files`.
            groups_in_memory: row groups that a process keeps; at least as many as are read at once, see ShardSampler.

        Raises:
            ConfigError: if a file or pyarrow is missing, the files differ in their columns, or none has a row.
            DataError: if a file cannot be read.
        """
        self._files = shard_files(shards, kind="parquet")
        parquet = require("pyarrow.parquet", what=f"{self._files[0]}", install="pyarrow")
        self._places: list[
            tuple[int, int, int]
        ] = []  # of each row group: file, number in it, rows of the file before it
        lengths, columns = [], []
        for number, file in enumerate(self._files):
            try:
                metadata = parquet.read_metadata(file)
            except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
                raise DataError(f"{file} cannot be read as parquet: {error}") from error
            columns.append(tuple(metadata.schema.to_arrow_schema().names))
            before = 0
            for group in range(metadata.num_row_groups):
                self._places.append((number, group, before))
                lengths.append(metadata.row_group(group).num_rows)
                before += lengths[-1]
        _check_columns(self._files, columns)
        self._numbers = ShardNumbers(lengths)
        self._groups = _RowGroups(self._files, columns[0], groups_in_memory)
        if not len(self):
            raise ConfigError(f"The parquet shards hold no row: {', '.join(map(str, self._files[:3]))}.")

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def shard_lengths(self) -> Sequence[int]:
        return self._numbers.lengths

    def record(self, index: int) -> ParquetRecord:
        shard, row = self._numbers.find(index)
        file, group, before = self._places[shard]
        return ParquetRecord(self._groups, file, group, row, before + row)


class _RowGroups:
    """The columns of the row groups that were read last."""

    def __init__(self, files: Sequence[Path], columns: tuple[str, ...], limit: int) -> None:
        self.files, self.columns = files, columns
        self._limit = limit
        self._opened: tuple[int, Any] | None = None
        self._read: OrderedDict[tuple[int, int], dict[str, Any]] = OrderedDict()

    def column(self, file: int, group: int, name: str) -> Any:
        """A column of a row group, as a ``pyarrow.ChunkedArray``.

        Raises:
            KeyError: if there is none of this name.
            DataError: if it cannot be read.
        """
        if name not in self.columns:
            raise KeyError(name)
        read = self._read.pop((file, group), {})
        self._read[file, group] = read
        if len(self._read) > self._limit:
            self._read.popitem(last=False)
        if name not in read:
            try:
                # One thread: a worker process is one of several, and may have been forked.
                read[name] = self._open(file).read_row_group(group, columns=[name], use_threads=False).column(name)
            except (OSError, ValueError) as error:
                raise DataError(f"{self.files[file]}, row group {group}, {name}: cannot be read: {error}") from error
        return read[name]

    def _open(self, file: int) -> Any:
        if self._opened is None or self._opened[0] != file:
            parquet = require("pyarrow.parquet", what=f"{self.files[file]}", install="pyarrow")
            self._opened = file, parquet.ParquetFile(self.files[file])
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None, "_read": OrderedDict()}


def _check_columns(files: Sequence[Path], columns: Sequence[tuple[str, ...]]) -> None:
    for file, here in zip(files, columns, strict=True):
        if set(here) != set(columns[0]):
            raise ConfigError(
                f"The parquet shards differ in their columns: {files[0]} has {list(columns[0])}, {file} has "
                f"{list(here)}. Use a dataset for each kind."
            )

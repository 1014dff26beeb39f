"""Datasets over shards on disk, of which every rank decodes what its modules need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from lightning_mimo.data.streams.parquet import ParquetRecords
from lightning_mimo.data.streams.records import Record, Records
from lightning_mimo.data.streams.tar import TarRecords
from lightning_mimo.errors import DataError, MimoError

Decode = Callable[[Any, frozenset[str]], dict[str, Any]]
"""``(record, modules) -> sample``: makes a sample for some modules. What it does not look at is not read."""

Length = Callable[[Any], int]
"""``record -> tokens`` of its sample, by which samples are packed."""

Cost = Callable[[Any], float | Mapping[str, float]]
"""``record -> work`` of its sample, by which batches are balanced: one number, or one for each module."""


class ShardedDataset(Dataset[Record]):
    """A map-style dataset over shards. It is shuffled and read fast with a ShardSampler."""

    def __init__(self, records: Records, decode: Decode, *, length: Length | None, cost: Cost | None) -> None:
        self._records = records
        self._decode = decode
        self._length = length
        self._cost = cost

    def __len__(self) -> int:
        return sum(self._records.shard_lengths)

    @property
    def shard_lengths(self) -> Sequence[int]:
        """Samples of each shard, in order."""
        return self._records.shard_lengths

    def __getitem__(self, index: int) -> Record:
        """A sample as the shard holds it: name of a field -> its value, read when it is looked at."""
        return self._records.record(index)

    def load(self, index: int, modules: frozenset[str]) -> dict[str, Any]:
        """A sample, decoded for some modules.

        Args:
            index: of the sample, in the order of the shards.
            modules: for which it is.

        Raises:
            DataError: naming shard and sample.
        """
        return self._called(self._decode, index, modules)

    @property
    def length(self) -> Callable[[int], int] | None:
        """``length(index)``, tokens of a sample, for MimoStrategy(pack_to=...); ``None`` if that was not given."""
        return None if self._length is None else partial(self._called, self._length)

    @property
    def cost(self) -> Callable[[int], float | Mapping[str, float]] | None:
        """``cost(index)``, work of a sample, for balanced batches; ``None`` if that was not given."""
        return None if self._cost is None else partial(self._called, self._cost)

    def _called[T](self, function: Callable[..., T], index: int, *arguments: Any) -> T:
        """What a function of the user's makes of a record; errors as of :meth:`load`."""
        record = self._records.record(index)
        try:
            return function(record, *arguments)
        except MimoError:
            raise
        except Exception as error:  # of the user's code, or of a library that reads images
            raise DataError(f"{record.where}: {type(error).__name__}: {error}") from error


class TarShards(ShardedDataset):
    """Tar files in the form of webdataset: consecutive files that differ in their ending alone are a sample.

    Only the headers of the tar files are read beforehand, and any sample can be read at any time, so the position in
    the data is exact, with any number of workers and in any layout.

    Example::

        def decode(record, modules):  # 000017.jpg and 000017.json of the shard
            sample = text_of(json.loads(record["json"]))
            if "images" in modules:  # other ranks do not read the image at all
                sample["modality_inputs"] = {"images": {"vit": {"pixel_values": pixels_of(record["jpg"])}}}
            return sample

        dataset = TarShards("data/train-{000..127}.tar", decode)
        loader = DataLoader(dataset, sampler=ShardSampler(dataset), num_workers=4)
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        decode: Decode,
        *,
        length: Length | None = None,
        cost: Cost | None = None,
        index_folder: str | Path | None = None,
    ) -> None:
        """
        Args:
            shards: files without compression: a path, a pattern with ``*`` or ``{000..127}``, or a list of these.
            decode: ``(record, modules) -> sample``; ``record`` is a mapping from the ending of a file to its bytes,
                and ``record.open(ending)`` reads less than all of them.
            length: ``record -> tokens`` of its sample, placeholders included, without which samples cannot be packed.
            cost: ``record -> work`` of its sample: a number, or one for each module, by which batches are balanced;
                ``None`` leaves them in order. Every rank asks for all samples, so neither should read images.
            index_folder: where the places of all samples are kept for the next run; ``None`` reads the headers of the
                tar files every time.

        Raises:
            ConfigError: if a file or the folder is missing, or no shard holds a sample.
            DataError: if a file cannot be read.
        """
        super().__init__(TarRecords(shards, index_folder=index_folder), decode, length=length, cost=cost)


class ParquetShards(ShardedDataset):
    """Parquet files, of which the row groups are the shards. Columns that a rank does not look at are not read.

    Example::

        dataset = ParquetShards("data/train-*.parquet", decode)  # decode(record, modules), record["image"] is a column
        loader = DataLoader(dataset, sampler=ShardSampler(dataset), num_workers=4)
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        decode: Decode,
        *,
        length: Length | None = None,
        cost: Cost | None = None,
        groups_in_memory: int = 4,
    ) -> None:
        """
        Args:
            shards: a path, a pattern with ``*`` or ``{000..127}``, or a list of these.
            decode: ``(record, modules) -> sample``; ``record`` is a mapping from columns to values as Python objects.
            length: ``record -> tokens`` of its sample, placeholders included, without which samples cannot be packed.
            cost: ``record -> work`` of its sample: a number, or one for each module, by which batches are balanced;
                ``None`` leaves them in order. Every rank asks for all samples, so neither should read images.
            groups_in_memory: row groups whose columns each process keeps; at least the ``shards_at_once`` of the
                ShardSampler, else one is read many times.

        Raises:
            ConfigError: if a file or pyarrow is missing, the files differ in their columns, or none has a row.
            DataError: if a file cannot be read.
        """
        records = ParquetRecords(shards, groups_in_memory=groups_in_memory)
        super().__init__(records, decode, length=length, cost=cost)

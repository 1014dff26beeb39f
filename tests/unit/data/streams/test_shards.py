"""Shards on disk: every sample is found, only what is looked at is read, and the order keeps reading local."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_mimo.data import ParquetShards, ShardSampler, TarShards
from lightning_mimo.data.order import SeededSampler
from lightning_mimo.data.packing import length_of
from lightning_mimo.data.sample_costs import SampleCosts
from lightning_mimo.data.streams.files import shard_files
from lightning_mimo.data.streams.tar import TarRecord, TarRecords
from lightning_mimo.errors import ConfigError, DataError
from tests.support.shards import write_tar

LENGTHS = (3, 1, 4)


def contents(number: int) -> dict[str, bytes]:
    return {"txt": str(number).encode(), "Left.PNG": bytes([number]) * 1000}


def write_shards(folder: Path) -> str:
    number = 0
    for shard, length in enumerate(LENGTHS):
        samples = [(f"part/{number + each:04d}", contents(number + each)) for each in range(length)]
        write_tar(folder / f"train-{shard:03d}.tar", samples)
        number += length
    return f"{folder}/train-{{000..002}}.tar"


def decode(record: Any, modules: frozenset[str]) -> dict[str, Any]:
    sample: dict[str, Any] = {"input_ids": int(record["txt"])}
    return sample | ({"pixels": record["left.png"]} if "images" in modules else {})


def test_every_sample_of_tar_shards_is_found(tmp_path: Path) -> None:
    dataset = TarShards(write_shards(tmp_path), decode)
    assert dataset.shard_lengths == LENGTHS and len(dataset) == 8
    for number in (7, 0, 3, 4, 2, 1, 6, 5):
        assert dict(dataset[number]) == {"txt": str(number).encode(), "left.png": bytes([number]) * 1000}
        assert dataset.load(number, frozenset({"images"})) == {"input_ids": number, "pixels": bytes([number]) * 1000}
    assert dataset[3].where == f"{tmp_path}/train-001.tar, sample 'part/0003'"
    with pytest.raises(IndexError, match="sample 8 of 8"):
        dataset[8]


def test_what_a_rank_does_not_need_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, sizes = TarShards(write_shards(tmp_path), decode), []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *given: sizes.append(given[1]) or pread(*given))
    dataset.load(2, frozenset({"language"}))
    assert sizes == [1]
    record = dataset[2]
    assert isinstance(record, TarRecord)
    with record.open("left.png") as file:
        file.seek(-10, os.SEEK_END)
        assert file.read(20) == bytes([2]) * 10
    assert record.field_of("0002.left.png") == record.field_of("left.png") == "left.png"
    assert record.field_of("0001.left.png") is record.field_of("right.png") is None


def test_lengths_and_costs_are_told_from_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shards(tmp_path)
    dataset = Subset(TarShards(shards, decode, length=lambda record: 1 + int(record["txt"]), cost=work), [6, 2])

    def costs_of(each: Any) -> SampleCosts:
        costs = SampleCosts.of_dataset(each, modules=("images", "language"))
        assert costs is not None
        return costs

    assert [length_of(dataset)(number) for number in range(2)] == [7, 3]
    monkeypatch.setattr(TarRecord, "open", None)  # no image is read
    assert costs_of(dataset).of([0, 1])["images"].tolist() == [1, 3]
    with pytest.raises(DataError, match=r"train-000\.tar, sample 'part/0000': ZeroDivisionError"):
        costs_of(dataset.dataset).of([0])
    silent = TarShards(shards, decode)
    assert SampleCosts.of_dataset(silent, modules=("language",)) is None
    with pytest.raises(DataError, match=r"TarShards does not tell them\. .*TarShards\(length=\.\.\.\)"):
        length_of(silent)


def work(record: Any) -> dict[str, float]:
    return {"images": 6 / int(record["txt"]), "language": 1.0}


def test_workers_of_every_kind_read_shards(tmp_path: Path) -> None:
    dataset = TarShards(write_shards(tmp_path), decode)
    dataset.load(0, frozenset())  # opens a file, which workers do not get
    copy = pickle.loads(pickle.dumps(dataset))
    assert [copy.load(number, frozenset())["input_ids"] for number in range(8)] == list(range(8))


def test_index_is_kept_and_made_anew_for_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, folder = write_shards(tmp_path), tmp_path / "index"
    with pytest.raises(ConfigError, match=r"index_folder='.*index': there is no such folder"):
        TarShards(shards, decode, index_folder=folder)
    folder.mkdir()
    TarShards(shards, decode, index_folder=folder)
    assert sorted(file.name for file in folder.iterdir()) == [f"train-00{number}.tar.index.npz" for number in range(3)]
    with monkeypatch.context() as without:
        without.setattr("tarfile.open", None)
        assert len(TarShards(shards, decode, index_folder=folder)) == 8
    write_tar(tmp_path / "train-001.tar", [("a", contents(70)), ("b", contents(71))])
    (folder / "train-002.tar.index.npz").write_bytes(b"cut off")
    assert TarShards(shards, decode, index_folder=folder).shard_lengths == (3, 2, 4)


@pytest.mark.parametrize(
    ("samples", "compression", "message"),
    [
        ([("a", {"txt": b""})], "gz", r"a.tar cannot be read as an uncompressed tar file.*packed again without"),
        ([("a", {"txt": b"1"}), ("a", {"TXT": b"2"})], "", r"a.tar, sample 'a' has two files that end in .txt"),
        ([("__meta__", {"txt": b"1"})], "", r"The tar shards hold no sample: .*a.tar"),
    ],
)
def test_shards_that_cannot_be_read(tmp_path: Path, samples: Any, compression: str, message: str) -> None:
    file = write_tar(tmp_path / "a.tar", samples, compression=compression)
    with pytest.raises((ConfigError, DataError), match=message):
        TarShards(file, decode)


def test_errors_name_shard_and_sample(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    with pytest.raises(DataError, match=r"train-000.tar, sample 'part/0001': KeyError: 'json'"):
        TarShards(shards, lambda record, modules: record["json"]).load(1, frozenset())
    records = TarRecords(shards)
    os.truncate(tmp_path / "train-000.tar", 1024)
    with pytest.raises(DataError, match=r"sample 'part/0000', left.png: the file ends after 0 of 1000 bytes"):
        records.record(0)["left.png"]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("{}/none.tar", r"There is no tar shard '.*none.tar'"),
        ("{}/*.zip", r"There is no tar shard that matches '.*\*.zip'"),
        (["{}/train-000.tar", "{}/train-00*.tar"], r"train-000.tar is named 2 times"),
        ("https://host/a.tar", r"'https://host/a.tar' is not on disk.*Mount or download it"),
        ("pipe:cat a.tar", r"'pipe:cat a.tar' is not on disk"),
        ([], "the list of files is empty"),
    ],
)
def test_names_of_shards_that_are_not_there(tmp_path: Path, shards: Any, message: str) -> None:
    write_shards(tmp_path)
    given = [each.format(tmp_path) for each in ([shards] if isinstance(shards, str) else shards)]
    with pytest.raises(ConfigError, match=message):
        shard_files(given, kind="tar")


def write_parquet(folder: Path, **options: Any) -> str:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    for file in range(2):
        rows = [{"txt": str(file * 5 + row), "left.png": bytes([file * 5 + row]) * 9} for row in range(5)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{file}.parquet", row_group_size=2)
    return f"{folder}/*.parquet"


def test_every_row_of_parquet_shards_is_found_and_columns_are_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ParquetShards(write_parquet(tmp_path), decode, groups_in_memory=2)
    assert dataset.shard_lengths == (2, 2, 1, 2, 2, 1)
    import pyarrow.parquet

    read, groups = [], pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "read_row_group",
        lambda file, group, **given: read.append((group, given["columns"])) or groups(file, group, **given),
    )
    assert [dataset.load(row, frozenset())["input_ids"] for row in range(10)] == list(range(10))
    assert read == [(group, ["txt"]) for group in (0, 1, 2, 0, 1, 2)]
    read.clear()
    assert [dataset.load(row, frozenset({"images"}))["pixels"][0] for row in (9, 7, 8, 9)] == [9, 7, 8, 9]
    assert read == [(2, ["left.png"]), (1, ["left.png"])]
    assert dataset[7].where == f"{tmp_path}/1.parquet, row 2"
    copy = pickle.loads(pickle.dumps(dataset))
    assert dict(copy[0]) == {"txt": "0", "left.png": bytes(9)}


def test_parquet_shards_that_cannot_be_read(tmp_path: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    write_parquet(tmp_path)
    parquet.write_table(pyarrow.Table.from_pylist([{"a": 1}]), tmp_path / "2.parquet")
    with pytest.raises(
        ConfigError, match=r"differ in their columns: .*0.parquet has \['txt', 'left.png'\], .* \['a'\]"
    ):
        ParquetShards(f"{tmp_path}/*.parquet", decode)
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"bad.parquet cannot be read as parquet"):
        ParquetShards(tmp_path / "bad.parquet", decode)


class Lengths:
    shard_lengths = (5, 3, 4, 2, 6)


def test_a_few_shards_are_mixed_at_a_time() -> None:
    order = list(ShardSampler(Lengths(), shards_at_once=2))
    assert sorted(order) == list(range(20))
    shard_of = torch.repeat_interleave(torch.arange(5), torch.tensor(Lengths.shard_lengths))
    seen = shard_of[torch.tensor(order)]
    first = list(dict.fromkeys(seen.tolist()))
    begin = 0
    for pair in (first[:2], first[2:4], first[4:]):
        end = begin + sum(Lengths.shard_lengths[shard] for shard in pair)
        assert set(seen[begin:end].tolist()) == set(pair)
        begin = end
    assert list(ShardSampler(Lengths(), shuffle=False)) == list(range(20))


def test_order_depends_on_seed_and_epoch_only() -> None:
    def orders(*, seed: int, epochs: list[int]) -> list[list[int]]:
        sampler, found = SeededSampler(ShardSampler(Lengths()), seed=seed), []
        for epoch in epochs:
            sampler.set_epoch(epoch)
            found.append(list(sampler))
        return found

    first, second = orders(seed=1, epochs=[0, 1])
    assert orders(seed=1, epochs=[1]) == [second] and first != second
    assert orders(seed=2, epochs=[0]) != [first]


def test_sampler_needs_shards() -> None:
    with pytest.raises(ConfigError, match=r"shard_lengths, such as TarShards, but got a list.*shuffle=True"):
        ShardSampler([1, 2])
    with pytest.raises(ConfigError, match=r"shards_at_once=0\) must be at least 1"):
        ShardSampler(Lengths(), shards_at_once=0)


def test_shards_in_a_plain_loader(tmp_path: Path) -> None:
    dataset = TarShards(write_shards(tmp_path), decode)
    loader = DataLoader(dataset, sampler=ShardSampler(dataset), batch_size=None)
    assert sorted(int(record["txt"]) for record in loader) == list(range(8))

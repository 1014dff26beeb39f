"""Streams of other libraries, where they are installed: the same batches again, wherever they begin."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from lightning_mimo.data import StreamDataset
from lightning_mimo.data.streams.reader import Place, StreamReader
from lightning_mimo.errors import DataError
from tests.support.shards import write_tar

NUMBER, BATCH = 30, 4


def reader(make: Callable[[], Any], **options: Any) -> StreamReader:
    return StreamReader(StreamDataset(make(), **options), batch_size=BATCH, drop_last=False, seed=1)


def check(make: Callable[[], Any], name: Callable[[Any], Any], *, expected: int = NUMBER, **options: Any) -> list[Any]:
    """Batches of two epochs; every one can be gone to, from each place that is saved."""
    epochs = []
    for epoch in range(2):
        whole = list(islice(reader(make, **options).read(Place(epoch=epoch)), -(-expected // BATCH)))
        for done in (1, 4, 6):
            place = Place(epoch=epoch, batches=done, state=whole[done - 1].place())
            found = list(islice(reader(make, **options).read(place), len(whole) - done))
            assert [[name(item) for item in batch.items] for batch in found] == [
                [name(item) for item in batch.items] for batch in whole[done:]
            ]
        epochs.append([name(item) for batch in whole for item in batch.items])
    return epochs


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard in range(3):
        samples = [(f"{shard}{number:02d}", {"txt": f"{shard * 10 + number}".encode()}) for number in range(10)]
        write_tar(tmp_path / f"shard-{shard}.tar", samples)
    return tmp_path


@pytest.mark.parametrize("shuffled", ["in order", "by its buffer", "by ours"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_hugging_face(tmp_path: Path, shuffled: str, caplog: pytest.LogCaptureFixture) -> None:
    datasets = pytest.importorskip("datasets")

    def make() -> Any:
        stream = datasets.Dataset.from_dict({"number": range(NUMBER)}).to_iterable_dataset(num_shards=3)
        return stream.shuffle(seed=3, buffer_size=7) if shuffled == "by its buffer" else stream

    options = {"shuffle_buffer": 7} if shuffled == "by ours" else {}
    with caplog.at_level("INFO"):
        first, second = check(make, lambda row: row["number"], **options)
    assert sorted(first) == list(range(NUMBER)) == sorted(second)
    assert (first != second) == (shuffled != "in order")
    assert ("does not come back to its saved state" in caplog.text) == (shuffled == "by its buffer")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
def test_webdataset(shards: Path) -> None:
    webdataset = pytest.importorskip("webdataset")

    def make() -> Any:
        pattern = f"{shards}/shard-{{0..2}}.tar"
        return webdataset.WebDataset(pattern, shardshuffle=False, nodesplitter=None, workersplitter=None)

    first, second = check(make, lambda sample: int(sample["txt"]), shuffle_buffer=7)
    assert sorted(first) == list(range(NUMBER)) == sorted(second) and first != second
    whole = list(reader(lambda: make().shuffle(8)).read(Place()))
    with pytest.raises(DataError, match="may draw from a generator of its own, as webdataset's shuffle"):
        next(reader(lambda: make().shuffle(8)).read(Place(batches=2, state=whole[1].place())))


@pytest.mark.filterwarnings("ignore::Warning")
def test_energon(shards: Path) -> None:
    energon = pytest.importorskip("megatron.energon")
    prepare = pytest.importorskip("megatron.energon.tools.prepare").command
    options = ("--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", str(shards))
    prepare(options, standalone_mode=False)

    @energon.stateless
    def cook(sample: dict[str, Any]) -> Any:
        return energon.TextSample(**energon.basic_sample_keys(sample), text=sample["txt"])

    class Encoder(energon.DefaultTaskEncoder):
        cookers = (energon.Cooker(cook),)

    def make() -> Any:
        alone = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
        dataset = energon.get_train_dataset(
            str(shards),
            worker_config=alone,
            batch_size=None,
            task_encoder=Encoder(),
            shuffle_buffer_size=4,
            max_samples_per_sequence=None,
        )
        return energon.get_loader(dataset)

    first, _ = check(make, lambda sample: int(sample.text), expected=2 * NUMBER)  # it has no end
    assert len(set(first)) == NUMBER

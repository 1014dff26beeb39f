"""A stream is read in the same global batches by every rank and worker, and goes on at any of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_mimo.data import StreamDataset
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.data.streams.ends import EndOfStream
from lightning_mimo.data.streams.loader import StreamLoader
from lightning_mimo.data.streams.reader import Place, RawBatch, StreamReader, checksum_of, parsed, plain
from lightning_mimo.data.streams.sharding import shard_stream
from lightning_mimo.errors import ConfigError, DataError
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import ModuleParallelism
from lightning_mimo.observe.spans import Spans

SAMPLES, BATCH = 22, 4


class Numbers(IterableDataset):
    """Yields numbers, moved by what it draws at random."""

    def __init__(self, number: int = SAMPLES) -> None:
        self.number = number
        self.epoch = 0
        self.yielded = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        assert get_worker_info() is None, "a worker looks like a process without others"
        for number in range(self.number):
            self.yielded += 1
            noise = random.random() + np.random.rand() + torch.rand(()).item()
            yield 1000 * self.epoch + number + noise / 4


class WithState(Numbers):
    """The same, but one can begin anywhere."""

    begin = 0

    def state_dict(self) -> dict[str, int]:
        return {"begin": self.begin}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["begin"]

    def __iter__(self) -> Iterator[float]:
        for number, item in enumerate(super().__iter__()):
            if number == self.begin:  # what is before draws other numbers, as a stream that skips does
                self.begin += 1
                yield float(int(item))
        self.begin = 0


class LosesItsBuffer(WithState):
    """Goes on a few samples later, as a shuffle buffer that is not saved."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["begin"] + 3


def shuffled() -> StreamDataset:
    return StreamDataset(Numbers(), shuffle_buffer=8)


def reader(stream: IterableDataset | StreamDataset, *, drop_last: bool = False, seed: int = 1) -> StreamReader:
    given = stream if isinstance(stream, StreamDataset) else StreamDataset(stream)
    return StreamReader(given, batch_size=BATCH, drop_last=drop_last, seed=seed)


def items(batches: Iterator[RawBatch]) -> list[list[Any]]:
    return [list(batch.items) for batch in batches]


def test_batches_follow_one_another_and_the_last_may_be_short() -> None:
    batches = list(reader(Numbers()).read(Place()))
    assert [[int(item) for item in batch.items] for batch in batches[:2]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [len(batch.items) for batch in batches] == [4, 4, 4, 4, 4, 2]
    assert [batch.number for batch in batches] == list(range(6))
    assert [batch.another_follows for batch in batches] == [True] * 5 + [False]
    dropped = list(reader(Numbers(), drop_last=True).read(Place()))
    assert [batch.another_follows for batch in dropped] == [True] * 4 + [False]
    exact = list(reader(Numbers(8)).read(Place()))
    assert [batch.another_follows for batch in exact] == [True, False]
    assert list(reader(Numbers(0)).read(Place())) == []


def test_what_a_stream_draws_depends_on_seed_and_epoch_only() -> None:
    stream = reader(Numbers())
    first, second = items(stream.read(Place())), items(stream.read(Place(epoch=1)))
    torch.rand(3)
    before = torch.random.get_rng_state()
    between = []
    for batch in reader(Numbers()).read(Place()):
        between.append(list(batch.items))
        random.random(), np.random.rand(), torch.rand(())  # of the training
    assert between == first
    assert items(reader(Numbers(), seed=2).read(Place())) != first
    assert second[0][0] >= 1000
    torch.random.set_rng_state(before)
    list(reader(Numbers()).read(Place()))
    assert torch.equal(torch.random.get_rng_state(), before), "the stream has generators of its own"


@pytest.mark.parametrize(
    "make", [Numbers, WithState, LosesItsBuffer, lambda: StreamDataset(Numbers(), shuffle_buffer=5)]
)
@pytest.mark.parametrize("done", [0, 1, 4])
def test_an_epoch_goes_on_at_any_batch(make: Callable[[], Any], done: int) -> None:
    whole = list(reader(make()).read(Place(epoch=2)))
    for known in range(done):
        place = Place(epoch=2, batches=done, state=parsed(plain(whole[known].place())))
        assert items(reader(make()).read(place)) == [list(batch.items) for batch in whole[done:]]


def test_a_saved_place_is_gone_to_without_reading_what_is_before(capsys: pytest.CaptureFixture[str]) -> None:
    whole = list(reader(WithState(400)).read(Place()))
    source = WithState(400)
    source.begin = 0
    stream = reader(source)
    found = next(stream.read(Place(batches=90, state=whole[89].place())))
    assert found.number == 90 and list(found.items) == list(whole[90].items)
    assert source.yielded == 0, "the stream itself is kept for the next epoch"


def test_a_stream_that_does_not_come_back_is_said_to(caplog: pytest.LogCaptureFixture) -> None:
    whole = list(reader(LosesItsBuffer()).read(Place()))
    with caplog.at_level("INFO"):
        next(reader(LosesItsBuffer()).read(Place(batches=2, state=whole[1].place())))
    assert "The stream LosesItsBuffer does not come back to its saved state, so the 2 global batches" in caplog.text
    changed = whole[1].place()
    with pytest.raises(DataError, match=r"Numbers does not yield the samples again.*global batch 1 of the epoch"):
        next(reader(Numbers()).read(Place(batches=2, state=changed)))
    with pytest.raises(DataError, match="place in the stream of samples is damaged"):
        parsed({"batch": 3})


def test_the_shuffle_buffer_mixes_all_samples() -> None:
    order = [
        int(item) for batch in items(reader(StreamDataset(Numbers(), shuffle_buffer=8)).read(Place())) for item in batch
    ]
    assert sorted(order) == list(range(SAMPLES)) != order
    plain_order = [int(item) for item in shuffled()]
    assert sorted(plain_order) == list(range(SAMPLES))


@pytest.mark.parametrize(
    "value", [1, "text", b"x" * 5000, np.arange(9), torch.arange(9), [1, [2.5, None]], {"a": {"b": b"1"}}]
)
def test_checksums_tell_items_apart(value: Any) -> None:
    assert checksum_of(value) == checksum_of(value)
    assert checksum_of([value]) != checksum_of([value, value])
    assert checksum_of(value) != checksum_of(b"y" * 5000)


# Loaders of ranks


FORMAT = SampleFormat(special_token_ids={"images": 9}, modules={"images": ("vit",)}, pad_token_id=0)


class Scenes(IterableDataset):
    """Samples whose first token is their number."""

    def __init__(self, number: int = SAMPLES) -> None:
        self.number = number

    def __iter__(self) -> Iterator[int]:
        return iter(range(10, 10 + self.number))


def sample(item: int, modules: frozenset[str]) -> dict[str, Any]:
    text = torch.tensor([item, 9, int(torch.randint(50, 60, ()))])
    inputs = {"images": {"vit": {"pixels": torch.rand(1, 2)}}} if "images" in modules else {}
    return {"input_ids": text, "labels": torch.tensor([11, 12, 13]), "modality_inputs": inputs}


def loader(
    options: dict[str, Any] | None = None,
    *,
    rank: int = 0,
    stream: Any = None,
    pack_to: int | None = None,
    balance: bool = True,
) -> StreamLoader:
    layout = MimoLayout.resolve(
        {"images": ModuleParallelism(dp=2), "language": ModuleParallelism()}, world_size=3, colocate=False
    )
    plan = RankBatchPlan.build(layout, rank, global_batch_size=BATCH, num_microbatches=2)
    given = DataLoader(StreamDataset(Scenes(), sample) if stream is None else stream, **(options or {}))
    ends = EndOfStream(Spans())
    return shard_stream(
        given, plan, ends, sample_format=FORMAT, seed=1, training=False, pack_to=pack_to, balance=balance
    )


def ids(batches: Any) -> list[list[list[int]]]:
    return [[each["input_ids"][:, 0].tolist() for each in batch] for batch in batches]


def test_every_rank_loads_its_part_of_the_same_batches() -> None:
    language = ids(loader(rank=2))
    assert language[:2] == [[[10, 11], [12, 13]], [[14, 15], [16, 17]]]
    assert language[-1] == [[30, 31], [30, 30]], "filled up"
    assert ids(loader(rank=0))[0] == [[10], [12]] and ids(loader(rank=1))[0] == [[11], [13]]
    last = list(loader(rank=2))[-1]
    assert [each["is_padding"] for each in last] == [(False, False), (True, True)]
    assert ids(loader({"drop_last": True, "batch_size": BATCH}, rank=2)) == language[:-1]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_batches(workers: int) -> None:
    alone = list(loader())
    found = list(loader({"num_workers": workers}))
    assert len(found) == len(alone)
    for one, other in zip(alone, found, strict=True):
        for here, there in zip(one, other, strict=True):
            assert torch.equal(here["input_ids"], there["input_ids"])
            pixels = [each["modality_inputs"]["images"]["vit"]["pixels"] for each in (here, there)]
            assert torch.equal(*pixels)
    resumed = loader({"num_workers": workers})
    resumed.load_state_dict({"batches": 2, "stream": None})
    assert ids(resumed) == ids(alone[2:])
    assert ids(resumed) == ids(alone), "the next epoch is whole"


def test_the_next_batch_is_loaded_ahead() -> None:
    given = loader(rank=2)
    batches = iter(given)
    first, second = next(batches), next(batches)  # as Lightning does, to know which is the last
    assert given.load_ahead() is second and first is not second
    assert ids([next(batches)]) == [[[18, 19], [20, 21]]]
    assert len(list(batches)) == 3
    assert given.load_ahead() is None


def test_training_waits_until_the_epoch_is_known() -> None:
    given = loader()
    given._waits_for_begin = True
    assert list(given) == []
    given.begin(limit=7)
    with pytest.raises(DataError, match=r"limit_train_batches=7\), but the stream Scenes has ended after 6 batches"):
        list(given)


def test_a_stream_that_can_be_gone_through_once_only_is_named() -> None:
    given = loader(stream=StreamDataset(iter(range(10, 30)), sample))
    assert len(list(given)) == 5
    given.set_epoch(1)
    with pytest.raises(DataError, match=r"The stream range_iterator gave rank 0 no sample in epoch 1.*begins anew"):
        list(given)
    given = loader()
    given.load_state_dict({"batches": 6, "stream": None})
    with pytest.raises(DataError, match=r"saved after 6 batches.*Scenes of rank 0 has no more than these"):
        list(given)


class Split(Scenes):
    _distributed = (0, 2)  # as split_dataset_by_node of datasets leaves it


@pytest.mark.parametrize(
    ("stream", "options", "message"),
    [
        (Scenes(), {"batch_size": 3}, r"batch_size=3, but MimoStrategy has global_batch_size=4"),
        (Scenes(), {"collate_fn": list}, r"collate_fn=list, which would not be called"),
        (Scenes(), {"num_workers": 1, "persistent_workers": True}, r"persistent_workers=True, but workers of a stream"),
        (Split(), {}, r"Split was divided with split_dataset_by_node"),
    ],
)
def test_what_would_not_be_used_is_refused(stream: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        loader(options, stream=stream)


def test_samples_of_a_stream_are_not_packed() -> None:
    with pytest.raises(DataError, match=r"pack_to=64\) packs samples.*the stream Scenes tells nothing of a sample"):
        loader(pack_to=64)


class Costly(Scenes):
    def cost(self, index: int) -> float:
        return float(index)


def test_samples_of_a_stream_are_not_balanced() -> None:
    with pytest.raises(DataError, match=r"The stream Costly has a method cost, but it would not be called.*balance="):
        loader(stream=StreamDataset(Costly(), sample))
    assert len(list(loader(stream=StreamDataset(Costly(), sample), balance=False))) == 6


def test_arguments_of_a_stream_are_checked() -> None:
    with pytest.raises(ConfigError, match="goes through an iterable, but got a int"):
        StreamDataset(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"shuffle_buffer=-1\) must not be negative"):
        StreamDataset(Scenes(), shuffle_buffer=-1)
    whole = list(StreamDataset(Scenes(3), sample))
    assert [int(each["input_ids"][0]) for each in whole] == [10, 11, 12]
    assert all("images" in each["modality_inputs"] for each in whole), "outside of a run there are all modules"

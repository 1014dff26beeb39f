"""The loader of a stream for one rank: reading, decoding and collating what its modules need of every global batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_mimo.data.collation import MicrobatchCollator, SampleRequest
from lightning_mimo.data.order import seed_generators
from lightning_mimo.data.prefetch import LoadsAhead
from lightning_mimo.data.sample_format import Sample
from lightning_mimo.data.streams.dataset import StreamDataset
from lightning_mimo.data.streams.ends import EndOfStream, Outcome
from lightning_mimo.data.streams.reader import Place, RawBatch, StreamReader, StreamState, parsed, plain
from lightning_mimo.data.worker_end import EndWithRank
from lightning_mimo.errors import DataError
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.parallel.random import seed_for

_STATES_KEPT = 16  # before older ones a run that resumes reads from the beginning of the epoch


@dataclass(frozen=True, kw_only=True)
class StreamShare:
    """What one rank takes of a stream.

    Attributes:
        stream: what is read.
        reader: reads it in global batches.
        plan: this rank's share of each.
        collate: puts the samples of this rank together.
        seed: the run's seed, the same on all ranks.
    """

    stream: StreamDataset
    reader: StreamReader
    plan: RankBatchPlan
    collate: MicrobatchCollator
    seed: int

    def load(self, batch: RawBatch, *, epoch: int) -> list[Microbatch]:
        """This rank's microbatches of a global batch."""
        with isolate_rng(include_cuda=False):
            return self.collate([(request, self._decode(batch, request)) for request in self._requests(batch, epoch)])

    def _requests(self, batch: RawBatch, epoch: int) -> list[SampleRequest]:
        """Samples are counted from the beginning of the epoch. A short batch is filled up as that of a dataset is."""
        begin, held = batch.number * self.plan.global_batch_size, len(batch.items)
        return [
            SampleRequest(
                index=begin + (position if position < held else 0),
                position=position,
                drawn=position,
                modules=self.plan.needed_by(position, microbatch),
                epoch=epoch,
                is_padding=position >= held,
            )
            for microbatch in range(self.plan.num_microbatches)
            for position in self.plan.samples_on_rank(microbatch)
        ]

    def _decode(self, batch: RawBatch, request: SampleRequest) -> Sample:
        item = batch.items[0 if request.is_padding else request.position]
        if self.stream.decode is None:
            return item
        seed_generators(seed_for(self.seed, f"sample/{request.epoch}/{request.index}"))
        return self.stream.decode(item, request.modules)


_Loaded = tuple[list[Microbatch], bool, StreamState]
"""This rank's part of a global batch, whether another follows, and the place in the stream before it."""


class _Batches(IterableDataset):
    """This rank's batches, every ``workers``-th of which is made by each worker. All of them read all of the stream."""

    def __init__(self, share: StreamShare, place: Place) -> None:
        self._share, self._place = share, place

    def __iter__(self) -> Iterator[_Loaded]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for batch in self._share.reader.read(self._place):
            if (batch.number - self._place.batches) % workers == worker:
                yield self._share.load(batch, epoch=self._place.epoch), batch.another_follows, batch.place()


class StreamLoader:
    """Yields this rank's microbatches of every global batch of a stream. Has no length.

    In training it begins when :meth:`begin` is called: Lightning loads the first batch of a loader without a length
    before it knows of the epoch.
    """

    def __init__(
        self, share: StreamShare, ends: EndOfStream, *, options: Mapping[str, Any], training: bool, first_epoch: int
    ) -> None:
        """
        Args:
            share: what this rank takes.
            ends: tells where the epoch ends.
            options: arguments of the DataLoader that loads: workers and the like.
            training: whether the run trains on it.
            first_epoch: the epoch until one is set.
        """
        self._share, self._ends, self._options = share, ends, options
        self._waits_for_begin = training
        self._limit: int | None = None
        self._place = Place(epoch=first_epoch)
        self._loading: LoadsAhead[_Loaded] | None = None
        self._last: list[Microbatch] | None = None  # that Lightning was given
        self._states: deque[StreamState] = deque(maxlen=_STATES_KEPT)

    @property
    def sampler(self) -> StreamLoader:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration goes through."""
        self._place = Place(epoch=epoch, batches=self._place.batches, state=self._place.state)

    def begin(self, *, limit: int | None) -> None:
        """Allow to begin. Called when the epoch is set.

        Args:
            limit: batches of an epoch; ``None`` where the stream says when it is over.
        """
        self._waits_for_begin, self._limit = False, limit

    def __iter__(self) -> Iterator[list[Microbatch]]:
        if self._waits_for_begin:
            return iter(())
        place, self._place = self._place, Place(epoch=self._place.epoch)
        self._loading, self._last = LoadsAhead(iter(self._loader(place))), None
        self._states.clear()
        if place.state is not None:
            self._states.append(place.state)
        return self._agreed(place)

    def load_ahead(self) -> list[Microbatch] | None:
        """Load another batch now; returns the one that is trained on next, ``None`` if it is not known."""
        if self._loading is None:
            return None
        loaded = self._loading.load_ahead()
        # Without a limit Lightning is one batch ahead, to know which is the last.
        if self._limit is None:
            return self._last
        return None if loaded is None else loaded[0]

    def state_dict(self) -> dict[str, Any]:
        """What the strategy fills in when it saves a checkpoint."""
        return {"batches": 0, "stream": None}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Leave out the batches that are done, in the next epoch only."""
        self._place = Place(
            epoch=self._place.epoch, batches=state_dict["batches"], state=parsed(state_dict.get("stream"))
        )
        if self._place.batches and (self._place.state is None or self._place.state.state is None):
            rank_zero_info(
                f"The stream {self._share.stream.name} has no state that could be loaded, so the "
                f"{self._place.batches} global batches of this epoch that are done are read again and left out."
            )

    def place_after(self, batches: int) -> dict[str, Any] | None:
        """The last known place before the end of so many batches of this epoch, for a checkpoint."""
        return plain(next((each for each in reversed(self._states) if each.batch < batches), None))

    def _loader(self, place: Place) -> DataLoader:
        options = dict(self._options)
        if options["num_workers"]:
            options["worker_init_fn"] = EndWithRank(options["worker_init_fn"])
        # Workers are made anew in every epoch, because what they were given was made for this one.
        generator = torch.Generator().manual_seed(seed_for(self._share.seed, "loader"))
        return DataLoader(
            _Batches(self._share, place), batch_size=None, collate_fn=_as_it_is, generator=generator, **options
        )

    def _agreed(self, place: Place) -> Iterator[list[Microbatch]]:
        """Batches until the stream of any rank has ended."""
        assert self._loading is not None
        loading, number = self._loading, place.batches
        loading.load_ahead()
        ended = loading.is_exhausted
        self._ends.say(ended=ended)
        while (outcome := self._ends.ask()).first_to_end is None:
            batch, another_follows, state = next(loading)
            self._states.append(state)
            number += 1
            ended = not another_follows
            self._ends.say(ended=ended)
            self._last = batch
            yield batch
        self._last = self._loading = None
        self._tell_end(outcome, number, place)

    def _tell_end(self, outcome: Outcome, number: int, place: Place) -> None:
        name = self._share.stream.name
        if number == 0:
            raise DataError(
                f"The stream {name} gave rank {outcome.first_to_end} no sample in epoch {place.epoch}. An iterator can "
                f"be gone through once only: give an object whose __iter__ begins anew."
            )
        if number == place.batches:
            raise DataError(
                f"The checkpoint was saved after {number} batches of an epoch, in the middle of it, but now the stream "
                f"{name} of rank {outcome.first_to_end} has no more than these. Resume with the same data."
            )
        if outcome.others_go_on:
            rank_zero_info(
                f"The epoch ends after {number} batches, because the stream {name} of rank {outcome.first_to_end} has "
                f"ended; those of other ranks had more, which is not used."
            )
        if self._limit is not None and number < self._limit:
            raise DataError(
                f"Trainer(limit_train_batches={self._limit}), but the stream {name} has ended after {number} batches, "
                f"so what comes at the end of an epoch would be left out. Set at most {number}, or leave it out."
            )


def _as_it_is(batch: Any) -> Any:
    return batch

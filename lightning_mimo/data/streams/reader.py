"""A stream, read in global batches: the same ones in every process, whatever the layout."""

from __future__ import annotations

import copy
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.utils.data._utils.worker as torch_worker
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import get_worker_info

from lightning_mimo.data.order import seed_generators
from lightning_mimo.data.streams.dataset import StreamDataset
from lightning_mimo.errors import DataError
from lightning_mimo.parallel.random import seed_for

_BYTES_COMPARED = 256  # of each bytes or array


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """A place in a stream, for a checkpoint.

    Attributes:
        batch: number of the global batch before which it is.
        state: what the ``state_dict`` of the source returned there; ``None`` if it has none.
        checksum: of what this batch held, by which a source is found out that does not yield the same again.
    """

    batch: int
    state: Any
    checksum: int


@dataclass(frozen=True, kw_only=True)
class RawBatch:
    """A global batch, not decoded.

    Attributes:
        number: in the epoch, from 0.
        items: one for each sample; the last batch may have less than the others.
        another_follows: whether the stream has another batch.
        state: what the source said of its place before this batch; ``None`` if it says nothing.
    """

    number: int
    items: Sequence[Any]
    another_follows: bool
    state: Any

    def place(self) -> StreamState:
        """The place before this batch, for a checkpoint."""
        return StreamState(batch=self.number, state=self.state, checksum=checksum_of(self.items))


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an epoch begins, or goes on.

    Attributes:
        epoch: from 0.
        batches: global batches at its beginning that are left out.
        state: a place at or before the last of these; ``None`` reads from the beginning.
    """

    epoch: int = 0
    batches: int = 0
    state: StreamState | None = None


class StreamReader:
    """Reads a stream in global batches. All randomness depends on the seed, the epoch and the batch."""

    def __init__(self, stream: StreamDataset, *, batch_size: int, drop_last: bool, seed: int) -> None:
        """
        Args:
            stream: what is read.
            batch_size: samples of a global batch.
            drop_last: whether to leave out a short last batch.
            seed: the run's seed, the same on all ranks.
        """
        self._stream = stream
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._seed = seed

    def read(self, place: Place) -> Iterator[RawBatch]:
        """The global batches of an epoch from a place on.

        Raises:
            DataError: if the stream does not yield what it did when the place was saved.
        """
        batches = self._resumed(place)
        if batches is None:
            batches = self._from(self._stream, place.epoch, first=0)
        for batch in batches:
            if batch.number >= place.batches:
                yield batch
            elif place.state is not None and batch.number == place.state.batch:
                self._check_same(batch, place.state)

    def _resumed(self, place: Place) -> Iterator[RawBatch] | None:
        """The batches after a saved place, if the source comes back to it; what is before costs nothing then."""
        saved = place.state
        if saved is None or saved.batch >= place.batches or saved.state is None or not self._stream.has_state:
            return None
        batches = self._from_state(saved, place)
        info = get_worker_info()
        if batches is None and (info is None or info.id == 0):
            rank_zero_info(
                f"The stream {self._stream.name} does not come back to its saved state, so the {place.batches} global "
                f"batches of this epoch that are done are read again and left out."
            )
        return batches

    def _from_state(self, saved: StreamState, place: Place) -> Iterator[RawBatch] | None:
        try:
            source = copy.deepcopy(self._stream.source)  # it is as it was for the epochs to come
            source.load_state_dict(copy.deepcopy(saved.state))  # type: ignore[attr-defined]  # has_state says so
        except Exception:  # of anybody's code: the other way, by reading, is always there
            return None
        batches = self._from(StreamDataset(source), place.epoch, first=saved.batch)
        found = next(batches, None)
        return batches if found is not None and checksum_of(found.items) == saved.checksum else None

    def _check_same(self, batch: RawBatch, saved: StreamState) -> None:
        if checksum_of(batch.items) != saved.checksum:
            raise DataError(
                f"The stream {self._stream.name} does not yield the samples again that it did: global batch "
                f"{batch.number} of the epoch is another one than when the checkpoint was saved, so the next sample is "
                f"unknown. It may draw from a generator of its own, as webdataset's shuffle() does, or its data has "
                f"changed. Shuffle with StreamDataset(shuffle_buffer=...), or resume from the end of an epoch."
            )

    def _from(self, stream: StreamDataset, epoch: int, *, first: int) -> Iterator[RawBatch]:
        if callable(set_epoch := getattr(stream.source, "set_epoch", None)):
            set_epoch(epoch)
        generators = _Generators()
        generators.seed(seed_for(self._seed, f"stream/{epoch}/{first}"))
        with _alone(), generators.used():
            state = stream.source.state_dict() if stream.has_state else None  # type: ignore[attr-defined]
            items = iter(stream.items())
        size, number, ahead = self._batch_size, first, list[Any]()
        while True:
            with _alone(), generators.used():
                ahead += islice(items, size - len(ahead))
                batch, ahead, before = ahead, [], state
                if stream.has_state:
                    state = stream.source.state_dict()  # type: ignore[attr-defined]
            if not batch or (self._drop_last and len(batch) < size):
                return
            generators.seed(seed_for(self._seed, f"stream/{epoch}/{number + 1}"))
            with _alone(), generators.used():
                ahead += islice(items, size if self._drop_last else 1)
            another_follows = len(ahead) == size if self._drop_last else bool(ahead)
            yield RawBatch(number=number, items=batch, another_follows=another_follows, state=copy.deepcopy(before))
            number += 1


class _Generators:
    """States of the default generators that belong to a stream, beside those that the process uses."""

    def __init__(self) -> None:
        self._states: tuple[Any, ...] | None = None
        self._seed = 0

    def seed(self, seed: int) -> None:
        self._seed, self._states = seed, None

    @contextmanager
    def used(self) -> Iterator[None]:
        """The default generators are those of the stream."""
        with isolate_rng(include_cuda=False):
            if self._states is None:
                seed_generators(self._seed)
            else:
                python, numpy, pytorch = self._states
                random.setstate(python)
                np.random.set_state(numpy)
                torch.random.default_generator.set_state(pytorch)
            yield
            self._states = random.getstate(), np.random.get_state(), torch.random.default_generator.get_state()


@contextmanager
def _alone() -> Iterator[None]:
    """A DataLoader worker looks like a process without others: libraries divide what they read by the worker."""
    worker, torch_worker._worker_info = torch_worker._worker_info, None
    try:
        yield
    finally:
        torch_worker._worker_info = worker


def checksum_of(value: Any) -> int:
    """Checksum of numbers, text, arrays, and lists and dictionaries of these: of long ones, of some of the bytes."""
    return zlib.crc32("".join(_described(value)).encode())


def _described(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield f"{key}="
            yield from _described(each)
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}"
        for each in value:
            yield from _described(each)
    elif isinstance(value, torch.Tensor):
        yield from _described(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    elif isinstance(value, bytes | bytearray | np.ndarray):
        content = np.frombuffer(value if isinstance(value, bytes | bytearray) else value.tobytes(), np.uint8)
        step = -(-content.size // _BYTES_COMPARED) | 1
        yield f"{content.size}:{zlib.crc32(np.ascontiguousarray(content[::step]))};"
    elif isinstance(value, str | int | float | bool | None):
        yield f"{value!r};"
    else:
        yield f"{type(value).__name__};"  # its contents are unknown


def plain(state: StreamState | None) -> dict[str, Any] | None:
    """As a dictionary of what a checkpoint may hold."""
    return None if state is None else {"batch": state.batch, "state": state.state, "checksum": state.checksum}


def parsed(saved: object) -> StreamState | None:
    """The opposite of :func:`plain`.

    Raises:
        DataError: if it is damaged.
    """
    if saved is None:
        return None
    if not isinstance(saved, dict) or set(saved) != {"batch", "state", "checksum"}:
        raise DataError("The checkpoint's place in the stream of samples is damaged. Resume from another checkpoint.")
    return StreamState(**saved)

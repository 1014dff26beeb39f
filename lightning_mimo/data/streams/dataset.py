"""A stream of samples that are decoded apart from being read, and shuffled by a buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset

from lightning_mimo.errors import ConfigError


class StreamDataset(IterableDataset):
    """A stream whose samples are read by every process, and decoded only where they are needed.

    Every rank, and every one of its workers, reads the whole stream, so that the ranks of all modules are on the same
    samples. What is costly belongs into ``decode``, which is called for the samples of this rank alone.

    Example, for a dataset of Hugging Face that is streamed::

        source = load_dataset("parquet", data_files="data/*.parquet", split="train", streaming=True)
        source = source.cast_column("image", datasets.Image(decode=False))
        stream = StreamDataset(source, decode, shuffle_buffer=1000)  # decode(row, modules) -> sample
        loader = DataLoader(stream, num_workers=2)
    """

    def __init__(
        self,
        source: Iterable[Any],
        decode: Callable[[Any, frozenset[str]], dict[str, Any]] | None = None,
        *,
        shuffle_buffer: int = 0,
    ) -> None:
        """
        Args:
            source: what is iterated, anew in every epoch: an IterableDataset of torch or of Hugging Face, a pipeline of
                webdataset. It must yield the same in every process, as for one process. Its ``set_epoch`` is called if
                it has one; what it draws from the default generators of Python, numpy and torch depends on seed and
                epoch.
            decode: ``(item, modules) -> sample``; ``None`` if the source yields samples. What it draws at random
                depends on the seed, the epoch and the number of the sample.
            shuffle_buffer: items that are held, of which a random one comes next; 0 keeps the order of the source. A
                buffer of Hugging Face's own is emptied by a checkpoint, which this one is not.

        Raises:
            ConfigError: if the source cannot be iterated, or the buffer is negative.
        """
        super().__init__()
        if not hasattr(source, "__iter__"):
            raise ConfigError(f"StreamDataset goes through an iterable, but got a {type(source).__name__}.")
        if shuffle_buffer < 0:
            raise ConfigError(f"StreamDataset(shuffle_buffer={shuffle_buffer}) must not be negative.")
        self.source = source
        self.decode = decode
        self.shuffle_buffer = shuffle_buffer

    @property
    def name(self) -> str:
        """Class of the source, for messages."""
        return type(self.source).__name__

    @property
    def has_state(self) -> bool:
        """Whether the place in the stream can be saved, so that a run that resumes need not read all before it."""
        has_both = all(callable(getattr(self.source, each, None)) for each in ("state_dict", "load_state_dict"))
        return has_both and not self.shuffle_buffer

    def __iter__(self) -> Iterator[Any]:
        return self.items() if self.decode is None else (self.decode(item, _EVERY_MODULE) for item in self.items())

    def items(self) -> Iterator[Any]:
        """What is read, not decoded, and shuffled."""
        if not self.shuffle_buffer:
            yield from self.source
            return
        held: list[Any] = []
        for item in self.source:
            if len(held) < self.shuffle_buffer:
                held.append(item)
                continue
            place = int(torch.randint(len(held), ()))
            held[place], item = item, held[place]
            yield item
        yield from (held[place] for place in torch.randperm(len(held)).tolist())


class _EveryModule(frozenset[str]):
    """The modules of a run that is not known."""

    def __contains__(self, module: object) -> bool:
        return True


_EVERY_MODULE = _EveryModule()


def as_stream(dataset: IterableDataset) -> StreamDataset:
    """The dataset itself if it is a StreamDataset, else one that reads and decodes at once."""
    return dataset if isinstance(dataset, StreamDataset) else StreamDataset(dataset)

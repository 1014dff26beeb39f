"""Divides a user's DataLoaders over the ranks, checks that ranks agree, and tracks the training data position."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any, cast

import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_mimo.data.data_state import DataState
from lightning_mimo.data.loader import ResumableLoader, check_loader, sampler_length, sampler_of, shard_dataloader
from lightning_mimo.data.order import SamplerStates
from lightning_mimo.data.packing import Packing, check_evaluation_order, gather_lengths
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.data.streams.ends import EndOfStream
from lightning_mimo.data.streams.loader import StreamLoader
from lightning_mimo.data.streams.sharding import is_stream, shard_stream
from lightning_mimo.errors import DataError
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.microbatch import Microbatch


class RunData:
    """The data of one ``fit``, ``validate``, ``test`` or ``predict``."""

    def __init__(self, plan: RankBatchPlan, ends: EndOfStream, *, balance: bool, pin_memory: bool = False) -> None:
        """
        Args:
            plan: this rank's share of every global batch.
            ends: tells all ranks where the epoch of a stream ends.
            balance: as for MimoStrategy.
            pin_memory: copy every batch to pinned memory, from which a GPU gets it without a wait of the host.
        """
        self._plan = plan
        self.ends = ends
        self._balance = balance
        self._pin_memory = pin_memory
        self._training_samples: int | None = None
        self._packing: Packing | None = None  # of the training data
        self._training: ResumableLoader | StreamLoader | None = None
        self._saved: DataState | None = None
        self._sampler_states: SamplerStates | None = None  # of the checkpoint, until the training sampler is there

    @property
    def resumes(self) -> bool:
        """Whether the next training DataLoader is that of the epoch in which the checkpoint was saved."""
        return self._sampler_states is not None

    def resume_from(self, saved: DataState, loader_state: Mapping[str, Any]) -> None:
        """Set the position of the checkpoint from which training resumes, and what :meth:`loader_state` was then."""
        self._saved = saved
        self._sampler_states = loader_state.get("sampler", ())

    def shard(
        self,
        loader: object,
        *,
        sample_format: SampleFormat,
        seed: int,
        training: bool,
        first_epoch: int = 0,
        pack_to: int | None = None,
    ) -> ResumableLoader | StreamLoader:
        """Rebuild a user's DataLoader for this rank. Collective over the world.

        Args:
            loader: the user's DataLoader, written as for one process.
            sample_format: keys, limits and modules of the samples.
            seed: seed of the order of samples and of their augmentation, the same on all ranks.
            training: whether the run trains on this DataLoader.
            first_epoch: epoch in which a run that was never interrupted would have asked for it.
            pack_to: most tokens of a row into which samples are packed; ``None`` for one sample a row.

        Raises:
            DataError: if the DataLoader cannot be divided, its length differs between ranks, its dataset differs in
                length from the one in whose epoch the checkpoint was saved, or its samples cannot be packed.
        """
        if not isinstance(loader, DataLoader):
            raise DataError(
                f"MimoStrategy divides a torch DataLoader over the ranks, but got a {type(loader).__name__}. "
                f"Return a DataLoader over a dataset."
            )
        packing, samples = None, 0
        sharded: ResumableLoader | StreamLoader
        if is_stream(loader):
            sharded = shard_stream(
                loader,
                self._plan,
                self.ends,
                sample_format=sample_format,
                seed=seed,
                training=training,
                pin_memory=self._pin_memory,
                first_epoch=first_epoch,
                pack_to=pack_to,
                balance=self._balance,
            )
            _check_same_lengths(None)
            self.ends.set_up()
        else:
            check_loader(loader, self._plan.global_batch_size)
            samples = len(cast(Sized, loader.dataset))
            _check_same_lengths((samples, sampler_length(loader)))  # first: each rank tells a part of other lengths
            packing = self._packing_of(loader, pack_to, training=training)
            sharded = shard_dataloader(
                loader,
                self._plan,
                sample_format=sample_format,
                seed=seed,
                pin_memory=self._pin_memory,
                first_epoch=first_epoch,
                resumed=training and self.resumes,
                sampler_states=(self._sampler_states if training else None) or (),
                balance=self._balance,
                packing=packing,
            )
        if training:
            self._training_samples, self._training, self._sampler_states = samples, sharded, None
            self._packing = packing
            self._check_saved(samples)
        return sharded

    def _packing_of(self, loader: DataLoader, pack_to: int | None, *, training: bool) -> Packing | None:
        """How samples become rows, if they are packed. Collective over the world."""
        if pack_to is None:
            return None
        if not training:
            check_evaluation_order(sampler_of(loader), pack_to)
        return Packing(budget=pack_to, lengths=gather_lengths(loader.dataset))

    def load_ahead(self) -> list[Microbatch] | None:
        """Load the next training batch now. Returns ``None`` if there are no more batches or loading failed."""
        return None if self._training is None else self._training.load_ahead()

    def loader_state(self, batches: int) -> dict[str, Any]:
        """Where the training DataLoader is after a number of batches of the current epoch, for a checkpoint.

        Plain if the state of the user's sampler or stream is.
        """
        if isinstance(self._training, StreamLoader):
            return {"batches": batches, "stream": self._training.place_after(batches)}
        return {"batches": batches, "sampler": [] if self._training is None else self._training.sampler_states()}

    def data_state(self, *, seed: int, batches: int) -> DataState | None:
        """Position after a number of batches of the current epoch; ``None`` if the run does not train."""
        if self._training_samples is None:
            return None
        return DataState(
            seed=seed,
            global_batch_size=self._plan.global_batch_size,
            samples=self._training_samples,
            batches=batches,
            pack_to=0 if self._packing is None else self._packing.budget,
            lengths=0 if self._packing is None else self._packing.checksum,
        )

    def _check_saved(self, samples: int) -> None:
        saved = self._saved
        if saved is None or not saved.batches:
            return
        where = "The checkpoint was saved in the middle of an epoch"
        if saved.samples != samples:
            then = f"{saved.samples} samples" if saved.samples else "a stream"
            now = f"dataset has {samples}" if samples else "data is a stream"
            raise DataError(
                f"{where} of {then}, but the training {now} now, so the next sample is unknown. Resume with the same "
                f"data, or from a checkpoint of the end of an epoch."
            )
        pack_to = 0 if self._packing is None else self._packing.budget
        if saved.pack_to != pack_to:
            then, now = (f"pack_to={each or None}" for each in (saved.pack_to, pack_to))
            raise DataError(
                f"{where} with MimoStrategy({then}), but {now} is set now, so the next row is unknown. Set {then}, or "
                f"resume from a checkpoint of the end of an epoch."
            )
        if self._packing is not None and saved.lengths != self._packing.checksum:
            raise DataError(
                f"{where} whose samples had other lengths, so they are packed into other rows now. Resume with the "
                f"same dataset, tokenizer and chat template, or from a checkpoint of the end of an epoch."
            )


def _check_same_lengths(own: tuple[int, int] | None) -> None:
    """Check that lengths of dataset and sampler agree on all ranks; ``None`` for a stream. Collective."""
    lengths: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lengths, own)
    streams = [rank for rank, each in enumerate(lengths) if each is None]
    if streams == list(range(len(lengths))):
        return
    if streams:
        raise DataError(f"The DataLoader goes through an IterableDataset on ranks {streams}, but not on the others.")
    of_dataset, of_sampler = zip(*lengths, strict=True)
    if len(set(of_dataset)) > 1:
        raise DataError(
            f"The dataset has a different length on different ranks: {dict(enumerate(of_dataset))}. Every rank must "
            f"see the same samples under the same indices."
        )
    if len(set(of_sampler)) > 1:
        raise DataError(
            f"The sampler has a different length on different ranks: {dict(enumerate(of_sampler))}. Every rank must "
            f"go through the same samples in the same order."
        )

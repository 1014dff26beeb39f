"""Divides a user's DataLoaders over the ranks, checks that ranks agree, and tracks the training data position."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, cast

import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_mimo.data.data_state import DataState
from lightning_mimo.data.loader import ResumableLoader, sampler_length, shard_dataloader
from lightning_mimo.data.order import SamplerStates
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.errors import DataError
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.microbatch import Microbatch


class RunData:
    """The data of one ``fit``, ``validate``, ``test`` or ``predict``."""

    def __init__(self, plan: RankBatchPlan, *, balance: bool) -> None:
        """
        Args:
            plan: this rank's share of every global batch.
            balance: as for MimoStrategy.
        """
        self._plan = plan
        self._balance = balance
        self._training_samples: int | None = None
        self._training: ResumableLoader | None = None
        self._saved: DataState | None = None
        self._sampler_states: SamplerStates | None = None  # of the checkpoint, until the training sampler is there

    @property
    def resumes(self) -> bool:
        """Whether the next training DataLoader is that of the epoch in which the checkpoint was saved."""
        return self._sampler_states is not None

    def resume_from(self, saved: DataState, sampler_states: SamplerStates) -> None:
        """Set the position of the checkpoint from which training resumes, and the states of the training sampler."""
        self._saved = saved
        self._sampler_states = sampler_states

    def shard(
        self,
        loader: object,
        *,
        sample_format: SampleFormat,
        seed: int,
        training: bool,
        first_epoch: int = 0,
    ) -> ResumableLoader:
        """Rebuild a user's DataLoader for this rank. Collective over the world.

        Args:
            loader: the user's DataLoader, written as for one process.
            sample_format: keys, limits and modules of the samples.
            seed: seed of the order of samples and of their augmentation, the same on all ranks.
            training: whether the run trains on this DataLoader.
            first_epoch: epoch in which a run that was never interrupted would have asked for it.

        Raises:
            DataError: if the DataLoader cannot be divided, its length differs between ranks, or its dataset differs in
                length from the one in whose epoch the checkpoint was saved.
        """
        if not isinstance(loader, DataLoader):
            raise DataError(
                f"MimoStrategy divides a torch DataLoader over the ranks, but got a {type(loader).__name__}. "
                f"Return a DataLoader over a map-style dataset."
            )
        sharded = shard_dataloader(
            loader,
            self._plan,
            sample_format=sample_format,
            seed=seed,
            first_epoch=first_epoch,
            resumed=training and self.resumes,
            sampler_states=(self._sampler_states if training else None) or (),
            balance=self._balance,
        )
        samples = len(cast(Sized, loader.dataset))
        _check_same_lengths(samples, sampler_length(loader))
        if training:
            self._training_samples, self._training, self._sampler_states = samples, sharded, None
            self._check_saved(samples)
        return sharded

    def load_ahead(self) -> list[Microbatch] | None:
        """Load the next training batch now. Returns ``None`` if there are no more batches or loading failed."""
        return None if self._training is None else self._training.load_ahead()

    def sampler_states(self) -> SamplerStates:
        """States of the training sampler, for a checkpoint; plain if the sampler's own state is."""
        return [] if self._training is None else self._training.sampler_states()

    def data_state(self, *, seed: int, batches: int) -> DataState | None:
        """Position after a number of batches of the current epoch; ``None`` if the run does not train."""
        if self._training_samples is None:
            return None
        return DataState(
            seed=seed,
            global_batch_size=self._plan.global_batch_size,
            samples=self._training_samples,
            batches=batches,
        )

    def _check_saved(self, samples: int) -> None:
        saved = self._saved
        if saved is not None and saved.batches and saved.samples != samples:
            raise DataError(
                f"The checkpoint was saved in the middle of an epoch of {saved.samples} samples, but the training "
                f"dataset has {samples} now, so the next sample is unknown. Resume with the same dataset, or from a "
                f"checkpoint of the end of an epoch."
            )


def _check_same_lengths(samples: int, drawn: int) -> None:
    """Check that lengths agree on all ranks. Collective over the world."""
    lengths: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lengths, (samples, drawn))
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

"""A user's DataLoaders divided over the ranks, checked against one another, and the position in the training data."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_mimo.batching import RankBatchPlan
from lightning_mimo.data import ResumableLoader, shard_dataloader
from lightning_mimo.module import MimoModule
from lightning_mimo.position import Position


class RunData:
    """The data of one ``fit``, ``validate``, ``test`` or ``predict``."""

    def __init__(self, plan: RankBatchPlan) -> None:
        """
        Args:
            plan: this rank's share of every global batch.
        """
        self._plan = plan
        self._training_samples: int | None = None
        self._training: ResumableLoader | None = None
        self._saved: Position | None = None

    def go_on(self, saved: Position) -> None:
        """Training goes on from a checkpoint that was saved there."""
        self._saved = saved

    def shard(self, loader: object, module: MimoModule, *, seed: int, training: bool) -> DataLoader:
        """Rebuild a user's DataLoader for this rank. Collective over the world.

        Args:
            loader: as for one process.
            module: says which tokens stand for what.
            seed: of the order of samples and their augmentation, the same on all ranks.
            training: whether it is what the run trains on.

        Raises:
            ValueError: if it cannot be divided, has another length on another rank, or is not what the checkpoint was
                saved in the middle of.
        """
        if not isinstance(loader, DataLoader):
            raise ValueError(
                f"MimoStrategy divides a torch DataLoader over the ranks, but got a {type(loader).__name__}. "
                f"Return a DataLoader over a map-style dataset."
            )
        sharded = shard_dataloader(
            loader,
            self._plan,
            special_token_ids=module.model.special_token_ids,
            pad_token_id=module.pad_token_id,
            seed=seed,
        )
        samples = len(loader.dataset)
        _check_same_length(samples)
        if training:
            self._training_samples, self._training = samples, sharded
            self._check_saved(samples)
        return sharded

    def load_ahead(self) -> None:
        """Load the next batch to train on now."""
        self._training.load_ahead()

    def position(self, *, seed: int, batches: int) -> Position | None:
        """Where the run is after some batches of the epoch; ``None`` where nothing is trained on."""
        if self._training_samples is None:
            return None
        return Position(
            seed=seed,
            global_batch_size=self._plan.global_batch_size,
            samples=self._training_samples,
            batches=batches,
        )

    def _check_saved(self, samples: int) -> None:
        saved = self._saved
        if saved is not None and saved.batches and saved.samples != samples:
            raise ValueError(
                f"The checkpoint was saved in the middle of an epoch of {saved.samples} samples, but the training "
                f"dataset has {samples} now, so the next sample cannot be told. Go on with the same dataset, or "
                f"from a checkpoint of the end of an epoch."
            )


def _check_same_length(length: int) -> None:
    lengths: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lengths, length)
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The dataset has a different length on different ranks: {dict(enumerate(lengths))}. Every rank must "
            f"see the same samples under the same indices."
        )

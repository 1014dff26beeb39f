"""A user's DataLoader, written as for one process, rebuilt so that each rank loads what its modules need.

The global batch is the unit: every step, every rank draws the same list of samples, keeps its own runs of it
(:class:`lightning_mimo.layout.batch_plan.RankBatchPlan`) and collates one dictionary per microbatch. The order of
samples, and what random augmentation does to one of them, depend on the seed, the epoch and the sample only, never on
the layout.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sized
from itertools import islice
from typing import cast

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
    Subset,
)

from lightning_mimo.data.collation import MicrobatchCollator, Sample, SampleRequest
from lightning_mimo.data.prefetch import LoadsAhead
from lightning_mimo.data.worker_end import EndWithRank
from lightning_mimo.errors import DataError
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.parallel.random import seed_for
from lightning_mimo.upstream.lightning import _IndexBatchSamplerWrapper


class SeededSampler(Sampler[int]):
    """The order of samples over all ranks. Lightning tells it the epoch through ``set_epoch``."""

    def __init__(self, sampler: Sampler[int], *, seed: int) -> None:
        """
        Args:
            sampler: the user's sampler; what it draws from torch's, numpy's and Python's default generators is made to
                depend on the seed and the epoch only.
            seed: the run's seed, the same on all ranks.
        """
        self._sampler = sampler
        self._seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(cast(Sized, self._sampler))

    def __iter__(self) -> Iterator[int]:
        if isinstance(self._sampler, SequentialSampler):
            yield from self._sampler
            return
        with isolate_rng(include_cuda=False):
            _seed_generators(seed_for(self._seed, f"order/{self.epoch}"))
            order = list(self._sampler)
        yield from order


class RankBatchSampler(BatchSampler):
    """Cuts the global order into global batches and keeps this rank's samples of each.

    A short last batch is filled up with repeats that count for nothing, unless it is dropped.
    """

    def __init__(self, order: SeededSampler, plan: RankBatchPlan, *, drop_last: bool) -> None:
        self.sampler = order  # the name under which Lightning looks for set_epoch
        self._order = order
        self.skip = 0  # batches at the beginning of the next epoch that have been learned from already
        self.batch_size = plan.global_batch_size
        self.drop_last = drop_last
        self._plan = plan

    def __len__(self) -> int:
        full, rest = divmod(len(self._order), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[list[SampleRequest]]:  # type: ignore[override]  # requests in place of indices
        batch: list[int] = []
        done, self.skip = self.skip * self.batch_size, 0
        for index in islice(self._order, done, None):
            batch.append(index)
            if len(batch) == self.batch_size:
                yield self._requests(batch)
                batch = []
        if batch and not self.drop_last:
            yield self._requests(batch)

    def _requests(self, batch: list[int]) -> list[SampleRequest]:
        return [
            SampleRequest(
                index=batch[position] if position < len(batch) else batch[0],
                position=position,
                modules=self._plan.needed_by(position, microbatch),
                epoch=self._order.epoch,
                is_padding=position >= len(batch),
            )
            for microbatch in range(self._plan.num_microbatches)
            for position in self._plan.samples_on_rank(microbatch)
        ]


class ModalityDataset(Dataset):
    """The user's dataset, asked for just the modules that this rank holds.

    A dataset with ``load(index, modules)`` decodes only those; of a plain one the rest is thrown away.
    """

    def __init__(self, dataset: Dataset, *, seed: int) -> None:
        self._load = _loader_of(dataset)
        self._seed = seed

    def __getitems__(self, requests: list[SampleRequest]) -> list[tuple[SampleRequest, Sample]]:
        """All samples of a global batch at once, so that the generators are saved and restored once only."""
        with isolate_rng(include_cuda=False):
            return [(request, self._load_seeded(request)) for request in requests]

    def _load_seeded(self, request: SampleRequest) -> Sample:
        _seed_generators(seed_for(self._seed, f"sample/{request.epoch}/{request.index}"))
        return self._load(request.index, request.modules)


def _seed_generators(seed: int) -> None:
    """The default generators of Python, numpy and torch's CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)


class ResumableLoader(DataLoader):
    """A DataLoader that can begin in the middle of an epoch. How far a run has come, the strategy knows.

    Without workers, the next batch can be loaded early. That changes no random number: every sample has its own.
    """

    _batches: LoadsAhead | None = None

    def __iter__(self) -> Iterator[list[Microbatch]]:  # type: ignore[override]  # LoadsAhead is an iterator, too
        if self.num_workers:
            if not isinstance(self.worker_init_fn, EndWithRank):  # here: Lightning sets one of its own until now
                self.worker_init_fn = EndWithRank(self.worker_init_fn)
            return super().__iter__()
        batches = super().__iter__()
        self._batches = LoadsAhead(batches)
        return self._batches

    def load_ahead(self) -> None:
        """Load the next batch now, unless there are workers that do so anyway."""
        if self._batches is not None:
            self._batches.load_ahead()

    def state_dict(self) -> dict[str, int]:
        """What the strategy fills in when it saves a checkpoint."""
        return {"batches": 0}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Leave out the batches that are done, in the next epoch only."""
        assert isinstance(self.batch_sampler, RankBatchSampler)
        self.batch_sampler.skip = state_dict["batches"]


def shard_dataloader(
    loader: DataLoader,
    plan: RankBatchPlan,
    *,
    special_token_ids: Mapping[str, int],
    pad_token_id: int,
    seed: int,
) -> ResumableLoader:
    """Rebuild a DataLoader that was written for one process for one rank.

    Args:
        loader: over a map-style dataset, with ``batch_size`` 1 or the global batch. Its sampler, ``drop_last`` and
            worker settings are kept; its ``collate_fn`` is replaced.
        plan: this rank's share.
        special_token_ids: encoder name -> its placeholder in ``input_ids``.
        pad_token_id: fills up short sequences.
        seed: the run's seed, the same on all ranks.

    Returns:
        A loader that yields, per global batch, the list of this rank's microbatches.

    Raises:
        DataError: for an IterableDataset, a DistributedSampler, a custom batch sampler, or another batch size.
    """
    _check_loader(loader, plan.global_batch_size)
    sampler = _batch_sampler_of(loader)
    order = SeededSampler(sampler.sampler, seed=seed)
    return ResumableLoader(
        ModalityDataset(loader.dataset, seed=seed),
        batch_sampler=RankBatchSampler(order, plan, drop_last=sampler.drop_last),
        collate_fn=MicrobatchCollator(plan, special_token_ids=special_token_ids, pad_token_id=pad_token_id),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        # Not the default generator, from which dropout draws on a CPU: a run that goes on iterates once more.
        generator=torch.Generator().manual_seed(seed_for(seed, "loader")),
    )


def _check_loader(loader: DataLoader, global_batch_size: int) -> None:
    if isinstance(loader.dataset, IterableDataset):
        raise DataError(
            f"{type(loader.dataset).__name__} is an IterableDataset, which cannot be asked for a given sample, so "
            f"ranks of different modules could not be kept on the same samples. Use a map-style dataset (__len__ and "
            f"__getitem__)."
        )
    sampler = _batch_sampler_of(loader)
    if type(sampler) is not BatchSampler:
        what = "batch_size=None" if sampler is None else f"a batch sampler of its own ({type(sampler).__name__})"
        raise DataError(
            f"The DataLoader has {what}, so MimoStrategy cannot form global batches and divide them over ranks. "
            f"Give it a sampler and batch_size={global_batch_size} instead."
        )
    batch_size = sampler.batch_size
    if batch_size not in (1, global_batch_size):
        raise DataError(
            f"The DataLoader has batch_size={batch_size}, but MimoStrategy has global_batch_size={global_batch_size}. "
            f"Write the DataLoader as for one process: batch_size={global_batch_size}, or leave it at 1."
        )
    if isinstance(sampler.sampler, DistributedSampler):
        raise DataError(
            "The DataLoader has a DistributedSampler, but MimoStrategy divides samples itself, differently for each "
            "module. Leave the sampler out and write shuffle=True where you want it."
        )


def _batch_sampler_of(loader: DataLoader) -> object:
    """The loader's batch sampler, without the wrapper that Lightning's predict loop puts around it."""
    sampler = loader.batch_sampler
    return sampler._batch_sampler if isinstance(sampler, _IndexBatchSamplerWrapper) else sampler


def _loader_of(dataset: Dataset) -> Callable[[int, frozenset[str]], Sample]:
    """``load(index, modules)`` of any map-style dataset, through ``torch.utils.data.Subset``."""
    if isinstance(dataset, Subset):
        inner = _loader_of(dataset.dataset)
        return lambda index, modules: inner(dataset.indices[index], modules)
    if callable(load := getattr(dataset, "load", None)):
        return load

    def load_all(index: int, modules: frozenset[str]) -> Sample:
        sample = dataset[index]
        inputs = {name: value for name, value in sample.get("modality_inputs", {}).items() if name in modules}
        return {**sample, "modality_inputs": inputs}

    return load_all

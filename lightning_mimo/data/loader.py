"""A user's DataLoader, written as for one process, rebuilt so that each rank loads what its modules need.

The global batch is the unit: every step, every rank draws the same list of samples, keeps its own runs of it
(:class:`lightning_mimo.layout.batch_plan.RankBatchPlan`) and collates one dictionary per microbatch. The order of
samples, and what random augmentation does to one of them, depend on the seed, the epoch and the sample only, never on
the layout. Which replica and microbatch takes a sample of the global batch, the layout and the costs of the samples
decide.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sized
from typing import cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    Sampler,
    default_collate,
    default_convert,
)

from lightning_mimo.data.collation import MicrobatchCollator, SampleRequest
from lightning_mimo.data.order import SamplerStates, SeededSampler, seed_generators
from lightning_mimo.data.packing import Packing, Row
from lightning_mimo.data.prefetch import LoadsAhead
from lightning_mimo.data.rank_share import DrawnBatch, RankShare
from lightning_mimo.data.row_order import RowOrder
from lightning_mimo.data.sample_costs import SampleCosts
from lightning_mimo.data.sample_format import Sample, SampleFormat
from lightning_mimo.data.worker_end import EndWithRank
from lightning_mimo.data.wrapped import owner_of
from lightning_mimo.errors import DataError
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.parallel.random import seed_for
from lightning_mimo.upstream.lightning import _IndexBatchSamplerWrapper


class GlobalBatchSampler(BatchSampler):
    """Cuts the order of an epoch into global batches.

    At each place of a global batch is a row: one sample, or several that are packed. What a rank loads of a batch is
    left to the workers: the main process draws the next batch before it hands out the one that is due.
    """

    def __init__(
        self, order: SeededSampler, *, batch_size: int, drop_last: bool, packing: Packing | None = None
    ) -> None:
        """
        Args:
            order: indices of an epoch.
            batch_size: rows of a global batch.
            drop_last: whether a short last batch is left out.
            packing: how samples become rows; ``None`` for one sample a row.
        """
        self.sampler = order  # the name under which Lightning looks for set_epoch
        self.order = order
        self._rows = RowOrder(order, packing)
        self.skip = 0  # batches at the beginning of the next epoch that have been learned from already
        self.batch_size = batch_size
        self.drop_last = drop_last

    def __len__(self) -> int:
        full, rest = divmod(len(self._rows), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[DrawnBatch]:  # type: ignore[override]  # a batch in place of indices
        batch: list[Row] = []
        done, self.skip = self.skip * self.batch_size, 0
        for row in self._rows.rows(done):
            batch.append(tuple(map(_as_index, row)))
            if len(batch) == self.batch_size:
                yield DrawnBatch(rows=batch, epoch=self.order.epoch)
                batch = []
        if batch and not self.drop_last:
            yield DrawnBatch(rows=batch, epoch=self.order.epoch)


class ModalityDataset(Dataset):
    """The user's dataset, asked for just the modules that this rank holds.

    A dataset with ``load(index, modules)`` decodes only those, also inside of ``torch.utils.data.Subset`` and
    ``ConcatDataset``; of a plain one the rest is thrown away.
    """

    def __init__(self, dataset: Dataset, share: RankShare, *, seed: int) -> None:
        self._dataset = dataset
        self._share = share
        self._seed = seed

    def __getitems__(self, batch: DrawnBatch) -> list[tuple[SampleRequest, Sample]]:
        """All samples of a global batch at once, so that the generators are saved and restored once only."""
        with isolate_rng(include_cuda=False):
            return [(request, self._load_seeded(request)) for request in self._share.requests(batch)]

    def _load_seeded(self, request: SampleRequest) -> Sample:
        seed_generators(seed_for(self._seed, f"sample/{request.epoch}/{request.index}"))
        dataset, index = owner_of(self._dataset, request.index, "load")
        load = getattr(dataset, "load", None)
        return load(index, request.modules) if callable(load) else dataset[index]


def _as_index(index: object) -> int:
    try:
        return operator.index(index)  # type: ignore[arg-type]  # the error is what is asked for
    except TypeError:
        raise DataError(
            f"The sampler yields {index!r}, a {type(index).__name__}, but must yield indices of the dataset, whole "
            f"numbers."
        ) from None


class ResumableLoader(DataLoader):
    """A DataLoader that can begin in the middle of an epoch. How far a run has come, the strategy knows.

    The next batch can be loaded early. That changes no random number: every sample has its own.
    """

    _batches: LoadsAhead[list[Microbatch]] | None = None

    def __iter__(self) -> Iterator[list[Microbatch]]:  # type: ignore[override]  # LoadsAhead is an iterator, too
        if self.num_workers and not isinstance(self.worker_init_fn, EndWithRank):
            # Here: Lightning sets one of its own until now.
            self.worker_init_fn = EndWithRank(self.worker_init_fn)
        self._batches = LoadsAhead(self._from_first_batch())
        return self._batches

    def _from_first_batch(self) -> Iterator[list[Microbatch]]:
        """Begin when the first batch is asked for, not before: Lightning then has set the epoch of the sampler."""
        yield from super().__iter__()

    def load_ahead(self) -> list[Microbatch] | None:
        """Load the next batch now, or take it from a worker; ``None`` if there is none."""
        return None if self._batches is None else self._batches.load_ahead()

    @property
    def order(self) -> SeededSampler:
        """The order of samples over all ranks."""
        assert isinstance(self.batch_sampler, GlobalBatchSampler)
        return self.batch_sampler.order

    def sampler_states(self) -> SamplerStates:
        """What the user's sampler needs to give the order of this epoch, or of the next one, again."""
        return self.order.states()

    def state_dict(self) -> dict[str, int]:
        """What the strategy fills in when it saves a checkpoint."""
        return {"batches": 0}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Leave out the batches that are done, in the next epoch only."""
        assert isinstance(self.batch_sampler, GlobalBatchSampler)
        self.batch_sampler.skip = state_dict["batches"]


def shard_dataloader(
    loader: DataLoader,
    plan: RankBatchPlan,
    *,
    sample_format: SampleFormat,
    seed: int,
    pin_memory: bool = False,
    first_epoch: int = 0,
    resumed: bool = False,
    sampler_states: SamplerStates = (),
    balance: bool = True,
    packing: Packing | None = None,
) -> ResumableLoader:
    """Rebuild a DataLoader that was written for one process for one rank.

    Args:
        loader: over a map-style dataset, with ``batch_size`` 1 or the global batch. Its sampler, ``drop_last`` and
            worker settings are kept.
        plan: this rank's share.
        sample_format: what samples hold.
        seed: the run's seed, the same on all ranks.
        pin_memory: copy batches to pinned memory, also where the user's loader does not say so.
        first_epoch: epoch for which the loader is made.
        resumed: as for SeededSampler.
        sampler_states: as for SeededSampler.
        balance: balance batches if the dataset tells the cost of a sample, see :class:`SampleCosts`.
        packing: how samples become rows; ``None`` for one sample a row.

    Returns:
        A loader that yields, per global batch, the list of this rank's microbatches.

    Raises:
        DataError: for a DistributedSampler, a custom batch sampler, a sampler without a length, a
            ``collate_fn``, a subclass that iterates in its own way, or another batch size.
    """
    check_loader(loader, plan.global_batch_size)
    sampler = cast(BatchSampler, _batch_sampler_of(loader))
    order = SeededSampler(
        cast(Sampler[int], sampler.sampler), seed=seed, first_epoch=first_epoch, resumed=resumed, saved=sampler_states
    )
    costs = SampleCosts.of_dataset(loader.dataset, modules=tuple(plan.dp_sizes)) if balance else None
    return ResumableLoader(
        ModalityDataset(loader.dataset, RankShare(plan, costs=costs, packing=packing), seed=seed),
        batch_sampler=GlobalBatchSampler(
            order, batch_size=plan.global_batch_size, drop_last=sampler.drop_last, packing=packing
        ),
        collate_fn=MicrobatchCollator(plan, sample_format, packing=packing),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory or pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        # Not the default generator, from which dropout draws on a CPU: a run that goes on iterates once more.
        generator=torch.Generator().manual_seed(seed_for(seed, "loader")),
    )


def sampler_of(loader: DataLoader) -> object:
    """The sampler of a user's DataLoader that :func:`shard_dataloader` takes."""
    return cast(BatchSampler, _batch_sampler_of(loader)).sampler


def sampler_length(loader: DataLoader) -> int:
    """Samples in an epoch, from the loader's sampler.

    Raises:
        DataError: if the sampler does not say.
    """
    sampler = cast(BatchSampler, _batch_sampler_of(loader)).sampler
    try:
        return len(cast(Sized, sampler))
    except (TypeError, NotImplementedError):
        raise DataError(
            f"The sampler {type(sampler).__name__} has no __len__, so it cannot be told when an epoch is over, nor "
            f"whether all ranks go through the same samples. Give it a __len__, the number of samples in an epoch; an "
            f"endless sampler is taken to end there."
        ) from None


def check_loader(loader: DataLoader, global_batch_size: int) -> None:
    """Refuse a DataLoader that cannot be rebuilt; errors as of :func:`shard_dataloader`."""
    sampler = _batch_sampler_of(loader)
    if type(sampler) is not BatchSampler:
        what = "batch_size=None" if sampler is None else f"a batch sampler of its own ({type(sampler).__name__})"
        raise DataError(
            f"The DataLoader has {what}, so MimoStrategy cannot form global batches and divide them over ranks. "
            f"Give it a sampler and batch_size={global_batch_size} instead."
        )
    check_batch_size(sampler.batch_size, global_batch_size)
    if isinstance(sampler.sampler, DistributedSampler):
        raise DataError(
            "The DataLoader has a DistributedSampler, but MimoStrategy divides samples itself, differently for each "
            "module. Leave the sampler out and write shuffle=True where you want it."
        )
    check_own_code(loader)
    sampler_length(loader)


def check_batch_size(batch_size: int, global_batch_size: int) -> None:
    """Refuse a batch size that is not the strategy's.

    Raises:
        DataError: naming both.
    """
    if batch_size not in (1, global_batch_size):
        raise DataError(
            f"The DataLoader has batch_size={batch_size}, but MimoStrategy has global_batch_size={global_batch_size}. "
            f"Write the DataLoader as for one process: batch_size={global_batch_size}, or leave it at 1."
        )


def check_own_code(loader: DataLoader) -> None:
    """Refuse code of the user's that would never be called.

    Raises:
        DataError: naming it.
    """
    if loader.collate_fn not in (default_collate, default_convert):  # the latter where batch_size is None
        name = getattr(loader.collate_fn, "__qualname__", type(loader.collate_fn).__name__)
        raise DataError(
            f"The DataLoader has collate_fn={name}, which would not be called: every rank takes other samples of the "
            f"global batch, for its own modules, and puts them together itself. Leave collate_fn out and do its work "
            f"for each sample, in the dataset's __getitem__; samples of different lengths are padded."
        )
    kind = type(loader)
    own = [name for name in ("__iter__", "__len__") if getattr(kind, name) is not getattr(DataLoader, name)]
    if own and not isinstance(loader, ResumableLoader):
        raise DataError(
            f"{kind.__name__} has its own {' and '.join(own)}, which would not be called: MimoStrategy builds a loader "
            f"of its own for every rank. Use a torch.utils.data.DataLoader, and put what {own[0]} does into the "
            f"dataset or the sampler."
        )


def _batch_sampler_of(loader: DataLoader) -> object:
    """The loader's batch sampler, without the wrapper that Lightning's predict loop puts around it."""
    sampler = loader.batch_sampler
    return sampler._batch_sampler if isinstance(sampler, _IndexBatchSamplerWrapper) else sampler

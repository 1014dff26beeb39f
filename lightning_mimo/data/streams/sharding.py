"""A user's DataLoader over a stream, rebuilt for one rank."""

from __future__ import annotations

from torch.utils.data import DataLoader, IterableDataset

from lightning_mimo.data.collation import MicrobatchCollator
from lightning_mimo.data.loader import check_batch_size, check_own_code
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.data.streams.dataset import StreamDataset, as_stream
from lightning_mimo.data.streams.ends import EndOfStream
from lightning_mimo.data.streams.loader import StreamLoader, StreamShare
from lightning_mimo.data.streams.reader import StreamReader
from lightning_mimo.errors import DataError
from lightning_mimo.layout.batch_plan import RankBatchPlan


def is_stream(loader: object) -> bool:
    """Whether a DataLoader goes through an IterableDataset."""
    return isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)


def shard_stream(
    loader: DataLoader,
    plan: RankBatchPlan,
    ends: EndOfStream,
    *,
    sample_format: SampleFormat,
    seed: int,
    training: bool,
    pin_memory: bool = False,
    first_epoch: int = 0,
    pack_to: int | None = None,
    balance: bool = False,
) -> StreamLoader:
    """Rebuild a DataLoader over an IterableDataset, written for one process, for one rank.

    Args:
        loader: over a stream that yields samples, with ``batch_size`` ``None``, 1 or the global batch.
        plan: this rank's share.
        ends: tells all ranks where an epoch ends.
        sample_format: what samples hold.
        seed: the run's seed, the same on all ranks.
        training: whether the run trains on it.
        pin_memory: copy batches to pinned memory, also where the user's loader does not say so.
        first_epoch: epoch for which the loader is made.
        pack_to: must be ``None``: samples cannot be packed before their lengths are known.
        balance: whether batches are to be balanced where costs are known; those of a stream are not.

    Raises:
        DataError: for a stream that divides itself over the ranks, a ``collate_fn``, persistent workers, a subclass
            that iterates in its own way, another batch size, or a stream with costs that would not be asked for.
    """
    stream = as_stream(loader.dataset)  # type: ignore[arg-type]  # is_stream
    check_stream(loader, stream, plan.global_batch_size)
    if pack_to is not None:
        raise DataError(
            f"MimoStrategy(pack_to={pack_to}) packs samples by their lengths, which it asks of the dataset beforehand, "
            f"but the stream {stream.name} tells nothing of a sample before it is read. Use a map-style dataset with "
            f"length(index), such as ChatData over tar or parquet shards, or leave pack_to out."
        )
    if balance and any(callable(getattr(each, "cost", None)) for each in (stream, stream.source)):
        raise DataError(
            f"The stream {stream.name} has a method cost, but it would not be called: costs are those of indices, "
            f"which samples of a stream do not have. Use a map-style dataset, such as TarShards(cost=...), or leave "
            f"samples in order with MimoStrategy(balance=False)."
        )
    reader = StreamReader(stream, batch_size=plan.global_batch_size, drop_last=loader.drop_last, seed=seed)
    share = StreamShare(
        stream=stream, reader=reader, plan=plan, collate=MicrobatchCollator(plan, sample_format), seed=seed
    )
    options = {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory or pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
    }
    return StreamLoader(share, ends, options=options, training=training, first_epoch=first_epoch)


def check_stream(loader: DataLoader, stream: StreamDataset, global_batch_size: int) -> None:
    """Refuse what would be left unused, or would give ranks different samples.

    Raises:
        DataError: naming it.
    """
    if loader.batch_size is not None:
        check_batch_size(loader.batch_size, global_batch_size)
    check_own_code(loader)
    if loader.persistent_workers:
        raise DataError(
            "The DataLoader has persistent_workers=True, but workers of a stream are made anew in every epoch, to "
            "begin at a place that only this epoch has. Leave it out."
        )
    if getattr(stream.source, "_distributed", None) is not None:  # of Hugging Face
        raise DataError(
            f"The stream {stream.name} was divided with split_dataset_by_node, but every rank must read the whole "
            f"stream: MimoStrategy divides its samples itself, differently for each module. Leave the split out."
        )

"""Position of a run in its training data, so that a resumed run begins with the next sample."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DataState:
    """Position of a run in its training data. All fields must agree to resume in the middle of an epoch.

    Attributes:
        seed: seed of the order of samples and of their augmentation.
        global_batch_size: samples per global batch.
        samples: number of samples in the training dataset; 0 for a stream, which has no length.
        batches: number of completed batches of the current epoch.
        pack_to: most tokens of a row into which samples are packed; 0 without packing.
        lengths: checksum of the lengths of all samples, from which rows are packed; 0 without packing.
    """

    seed: int
    global_batch_size: int
    samples: int
    batches: int
    pack_to: int = 0
    lengths: int = 0


def rewind_to_last_step(
    checkpoint: dict[str, Any], *, pending_batches: int, training: bool
) -> tuple[dict[str, Any], int]:
    """Rewind Lightning's loop counters to the last optimizer step, so that a resumed run trains on each batch once.

    Args:
        checkpoint: the dictionary that Lightning dumps; not modified.
        pending_batches: batches of an unfinished gradient accumulation, which no optimizer step has used yet.
        training: whether training is in progress; False after it has ended.

    Returns:
        A modified copy, and the number of completed batches of the current epoch.
    """
    checkpoint = {**checkpoint, "loops": deepcopy(checkpoint["loops"])}
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    if not training:
        _end_epoch(progress)
    elif pending_batches:
        _rewind(progress, pending_batches)
    _validate_again(loop["epoch_loop.val_loop.batch_progress"])
    return checkpoint, 0 if progress["is_last_batch"] else progress["current"]["processed"]


def _end_epoch(progress: dict[str, Any]) -> None:
    """Reset the counters if training ended with an epoch, so that the next epoch begins at its first batch.

    Otherwise a resumed run with ``max_steps`` would train on only one batch of the next epoch.
    """
    if progress["is_last_batch"]:
        progress["current"].update(dict.fromkeys(progress["current"], 0))
        progress["is_last_batch"] = False


def _rewind(progress: dict[str, Any], batches: int) -> None:
    """Decrease the counters by a number of batches that no optimizer step has used yet."""
    for counters in (progress["current"], progress["total"]):
        done = counters["processed"] - batches
        counters.update(ready=done, started=done, processed=done, completed=done)
    progress["is_last_batch"] = False


def _validate_again(progress: dict[str, Any]) -> None:
    """Restart a validation that was interrupted, because its running sums are not saved.

    The counters are set to the values by which Lightning recognizes a validation interrupted during its first batch.
    """
    if progress["current"]["processed"] > progress["current"]["completed"]:
        progress["current"].update(dict.fromkeys(progress["current"], 0))
        progress["total"].update(ready=1, started=1, processed=0, completed=0)
        progress["is_last_batch"] = False

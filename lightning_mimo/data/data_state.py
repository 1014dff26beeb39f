"""Where in the training data a run is, so that one that goes on begins with the next sample."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DataState:
    """Where in the data a run is: what has to agree for it to go on in the middle of an epoch.

    Attributes:
        seed: of the order of samples and their augmentation.
        global_batch_size: samples of a batch.
        samples: of the training dataset.
        batches: of the current epoch that are done.
    """

    seed: int
    global_batch_size: int
    samples: int
    batches: int


def rewind_to_last_step(checkpoint: dict[str, Any], *, held: int, training: bool) -> tuple[dict[str, Any], int]:
    """What Lightning keeps, changed so that a run that goes on from it learns from every batch once.

    Args:
        checkpoint: as Lightning dumps it; left as it is.
        held: batches of an open accumulation window, which no optimizer step has learned from.
        training: whether batches are being trained on, or all is over.

    Returns:
        The changed copy, and the number of batches of the current epoch that are done.
    """
    checkpoint = {**checkpoint, "loops": deepcopy(checkpoint["loops"])}
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    if not training:
        _end_epoch(progress)
    elif held:
        _rewind(progress, held)
    _validate_again(loop["epoch_loop.val_loop.batch_progress"])
    return checkpoint, 0 if progress["is_last_batch"] else progress["current"]["processed"]


def _end_epoch(progress: dict[str, Any]) -> None:
    """After training that ended with an epoch: the next one begins afresh.

    Left as it is, a run with ``max_steps`` would go on with one batch only of the next epoch.
    """
    if progress["is_last_batch"]:
        progress["current"].update(dict.fromkeys(progress["current"], 0))
        progress["is_last_batch"] = False


def _rewind(progress: dict[str, Any], batches: int) -> None:
    """As it was some batches before: none of them has been learned from yet."""
    for counters in (progress["current"], progress["total"]):
        done = counters["processed"] - batches
        counters.update(ready=done, started=done, processed=done, completed=done)
    progress["is_last_batch"] = False


def _validate_again(progress: dict[str, Any]) -> None:
    """In the middle of a validation: its sums are not saved, so all of it is run again.

    What is written is how Lightning recognizes a validation that was left during its first batch.
    """
    if progress["current"]["processed"] > progress["current"]["completed"]:
        progress["current"].update(dict.fromkeys(progress["current"], 0))
        progress["total"].update(ready=1, started=1, processed=0, completed=0)
        progress["is_last_batch"] = False

"""Where in the training data a run is, so that one that goes on begins with the next sample."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Position:
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


def begin_where_learned(checkpoint: dict[str, Any], *, held: int, training: bool) -> tuple[dict[str, Any], int]:
    """What Lightning keeps, changed so that a run that goes on from it learns from every batch once.

    Args:
        checkpoint: as Lightning dumps it; left as it is.
        held: batches of an open accumulation window, which no optimizer step has learned from.
        training: whether batches are being trained on, or all is over.

    Returns:
        The changed copy, and the number of batches of the current epoch that are done.
    """
    if not training:
        checkpoint = _between_epochs(checkpoint)
    elif held:
        checkpoint = _rewind(checkpoint, held)
    return checkpoint, _batches_done(checkpoint["loops"])


def _batches_done(loops: Mapping[str, Any]) -> int:
    """Batches of the current epoch that are done, by what Lightning keeps of its fit loop."""
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    return 0 if progress["is_last_batch"] else progress["current"]["processed"]


def _between_epochs(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy of what Lightning keeps after training that ended with an epoch, so that the next one begins afresh.

    Left as it is, a run with ``max_steps`` would go on with one batch only of the next epoch.
    """
    checkpoint = {**checkpoint, "loops": deepcopy(checkpoint["loops"])}
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if progress["is_last_batch"]:
        progress["current"].update(dict.fromkeys(progress["current"], 0))
        progress["is_last_batch"] = False
    return checkpoint


def _rewind(checkpoint: dict[str, Any], batches: int) -> dict[str, Any]:
    """A copy of what Lightning keeps, as it was some batches before: none of them has been learned from yet."""
    checkpoint = {**checkpoint, "loops": deepcopy(checkpoint["loops"])}
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counters in (progress["current"], progress["total"]):
        done = counters["processed"] - batches
        counters.update(ready=done, started=done, processed=done, completed=done)
    progress["is_last_batch"] = False
    return checkpoint

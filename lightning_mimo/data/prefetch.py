"""The next batch of a DataLoader without workers, loaded while the rank would wait for others."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

from lightning_mimo.microbatch import Microbatch


class LoadsAhead(Iterator[list[Microbatch]]):
    """Batches one after the other; the next one can be loaded before it is asked for."""

    def __init__(self, batches: Iterator[list[Microbatch]]) -> None:
        """
        Args:
            batches: loads one whenever it is asked for one.
        """
        self._batches = batches
        self._ahead: Future[list[Microbatch]] | None = None

    def __next__(self) -> list[Microbatch]:
        if self._ahead is None:
            return next(self._batches)
        ahead, self._ahead = self._ahead, None
        return ahead.result()

    def load_ahead(self) -> None:
        """Load the next batch, if that has not been done. What goes wrong is raised when the batch is asked for."""
        if self._ahead is not None:
            return
        self._ahead = Future()
        try:
            self._ahead.set_result(next(self._batches))
        except Exception as error:  # the end of the batches, too
            self._ahead.set_exception(error)

"""Loads the next batch of a DataLoader while the rank waits for other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

from lightning_mimo.microbatch import Microbatch


class LoadsAhead(Iterator[list[Microbatch]]):
    """Iterator over batches that can load the next batch before it is requested."""

    def __init__(self, batches: Iterator[list[Microbatch]]) -> None:
        """
        Args:
            batches: the underlying iterator, which loads one batch per ``next``.
        """
        self._batches = batches
        self._ahead: Future[list[Microbatch]] | None = None

    def __next__(self) -> list[Microbatch]:
        if self._ahead is None:
            return next(self._batches)
        ahead, self._ahead = self._ahead, None
        return ahead.result()

    def load_ahead(self) -> list[Microbatch] | None:
        """Load the next batch unless it is already loaded. An error is deferred until the batch is requested.

        Returns:
            The batch; ``None`` if loading failed or there are no more batches.
        """
        if self._ahead is None:
            self._ahead = Future()
            try:
                self._ahead.set_result(next(self._batches))
            except Exception as error:  # StopIteration, too
                self._ahead.set_exception(error)
        return None if self._ahead.exception() else self._ahead.result()

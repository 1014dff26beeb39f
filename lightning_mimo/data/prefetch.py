"""Loads the next batch of a DataLoader while the rank waits for other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future


class LoadsAhead[T](Iterator[T]):
    """Iterator over batches that can load the next batch before it is requested."""

    def __init__(self, batches: Iterator[T]) -> None:
        """
        Args:
            batches: the underlying iterator, which loads one batch per ``next``.
        """
        self._batches = batches
        self._ahead: Future[T] | None = None

    def __next__(self) -> T:
        if self._ahead is None:
            return next(self._batches)
        ahead, self._ahead = self._ahead, None
        return ahead.result()

    @property
    def is_exhausted(self) -> bool:
        """Whether the next batch was to be loaded ahead, and there is none."""
        return self._ahead is not None and isinstance(self._ahead.exception(), StopIteration)

    def load_ahead(self) -> T | None:
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

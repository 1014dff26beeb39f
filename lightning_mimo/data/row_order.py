"""The rows of each epoch, packed or not, from the order of samples."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_mimo.data.order import SeededSampler
from lightning_mimo.data.packing import Packing, Row, pack_rows


class RowOrder:
    """The rows of each epoch. Without packing, every sample is a row."""

    def __init__(self, order: SeededSampler, packing: Packing | None) -> None:
        """
        Args:
            order: samples of each epoch.
            packing: how they become rows; ``None`` for one sample a row.
        """
        self.order = order
        self._packing = packing
        self._packed: tuple[int, list[Row]] | None = None  # epoch and its rows

    def __len__(self) -> int:
        """Rows of the epoch; while its order cannot be known yet without drawing it, an estimate."""
        if self._packing is None:
            return len(self.order)
        if self.order.is_known:
            return len(self._rows(self._packing))
        mean = float(self._packing.lengths.mean()) if len(self._packing.lengths) else 0.0
        return -(-round(len(self.order) * mean) // self._packing.budget)

    def rows(self, start: int) -> Iterator[Row]:
        """The rows of the epoch that the order is set to, from one on."""
        if self._packing is None:
            for number, index in enumerate(self.order):
                if number >= start:
                    yield (index,)
        else:
            yield from self._rows(self._packing)[start:]

    def _rows(self, packing: Packing) -> list[Row]:
        epoch = self.order.epoch
        if self._packed is None or self._packed[0] != epoch:
            self._packed = epoch, pack_rows(list(self.order), packing)
        return self._packed[1]

"""What one rank loads of a global batch, found where the batch is loaded: in a worker, if there are any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mimo.data.balance import balanced_order
from lightning_mimo.data.collation import SampleRequest
from lightning_mimo.data.packing import Packing, Row
from lightning_mimo.data.sample_costs import SampleCosts
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.layout.module_parallelism import LANGUAGE


@dataclass(frozen=True, kw_only=True)
class DrawnBatch:
    """A global batch as it was drawn, the same on every rank.

    Attributes:
        rows: in the order of the sampler; fewer than the global batch size in a short last batch.
        epoch: counted from 0.
    """

    rows: Sequence[Row]
    epoch: int


class RankShare:
    """Finds the samples of one rank in every global batch.

    A short batch is filled up with repeats of one sample, which count for nothing: the cheapest of the batch where
    costs are known, else the shortest where lengths are, else the first.
    """

    def __init__(
        self, plan: RankBatchPlan, *, costs: SampleCosts | None = None, packing: Packing | None = None
    ) -> None:
        """
        Args:
            plan: this rank's share of a global batch.
            costs: of the samples, by which batches are balanced; ``None`` to leave them in order.
            packing: how samples became rows; ``None`` for one sample a row.
        """
        self._plan = plan
        self._costs = costs
        self._packing = packing
        self._padded = frozenset({LANGUAGE}) if packing is None else frozenset[str]()

    def requests(self, batch: DrawnBatch) -> list[SampleRequest]:
        """The samples that this rank loads, by microbatch and position.

        Raises:
            DataError: for costs that cannot be used, naming the sample.
        """
        size = self._plan.global_batch_size
        rows = list(batch.rows)
        if missing := size - len(rows):
            rows += [(self._filler(batch.rows),)] * missing
        order = range(size) if self._costs is None else self._balanced(self._costs.of_rows(rows))
        return [
            SampleRequest(
                index=index,
                position=position,
                drawn=order[position],
                place=place,
                modules=self._plan.needed_by(position, microbatch),
                epoch=batch.epoch,
                is_padding=order[position] >= len(batch.rows),
            )
            for microbatch in range(self._plan.num_microbatches)
            for position in self._plan.samples_on_rank(microbatch)
            for place, index in enumerate(rows[order[position]])
        ]

    def _filler(self, rows: Sequence[Row]) -> int:
        samples = [index for row in rows for index in row]
        if self._costs is not None:
            return self._costs.cheapest(samples)
        if self._packing is not None:
            return min(samples, key=self._packing.lengths.__getitem__)
        return samples[0]

    def _balanced(self, costs: Mapping[str, np.ndarray]) -> list[int]:
        """Which row of a global batch is at each position."""
        plan = self._plan
        order = balanced_order(
            costs, dp_sizes=plan.dp_sizes, num_microbatches=plan.num_microbatches, padded=self._padded
        )
        return order.tolist()

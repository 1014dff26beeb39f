"""Modules that fail on one rank, for the test of what the others then do."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from examples.digits.model import DigitsModule


class FailsOnRank2(DigitsModule):
    rank = 2

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if dist.get_rank() == self.rank and batch_idx == 1:
            raise ZeroDivisionError(f"the cause, on rank {self.rank}")
        return super().training_step(batch, batch_idx)


class FailsOnRank0(FailsOnRank2):
    """Rank 0 is the process that started the others."""

    rank = 0

"""A module that fails on one rank, for the test of what the others then do."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from examples.digits.model import DigitsModule


class FailsOnRank2(DigitsModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if dist.get_rank() == 2 and batch_idx == 1:
            raise ZeroDivisionError("the cause, on rank 2")
        return super().training_step(batch, batch_idx)

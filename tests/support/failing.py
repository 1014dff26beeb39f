"""Modules that fail or stop on one rank, for the test of what the others then do."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist
from megatron.core.utils import unwrap_model

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


class StopsInForwardOfRank0(DigitsModule):
    """Rank 0, of the encoder, never comes back from its second forward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if dist.get_rank() == 0 and batch_idx == 1:
            for encoder in unwrap_model(self.model.modality_submodules["images"]).encoders.values():
                encoder.register_forward_hook(_sleep)
        return super().training_step(batch, batch_idx)


class StopsBeforeReductionOnRank1(DigitsModule):
    """Rank 1, of the encoder, computes its gradients and does not come to reduce them with rank 0."""

    def on_train_start(self) -> None:
        super().on_train_start()
        if dist.get_rank() == 1:
            self.model.config.finalize_model_grads_func = _sleep


def _sleep(*args: Any, **kwargs: Any) -> None:
    time.sleep(600)

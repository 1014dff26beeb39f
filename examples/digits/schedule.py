"""The learning-rate schedule of the examples."""

from __future__ import annotations

from typing import Any

import torch


def warmup_then_cosine(optimizer: torch.optim.Optimizer, *, warmup_steps: int, steps: int) -> dict[str, Any]:
    """Linear warm-up followed by a cosine decay to 0, in the form that ``configure_optimizers`` returns.

    Args:
        optimizer: optimizer whose learning rates are the peak values.
        warmup_steps: optimizer steps of warm-up.
        steps: optimizer steps of the entire run.
    """
    schedule: Any = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-3, total_iters=warmup_steps),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup_steps)),
        ],
        milestones=[warmup_steps],
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

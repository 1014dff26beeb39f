"""The learning-rate schedule of the examples."""

from __future__ import annotations

from typing import Any

import torch


def warmup_then_cosine(optimizer: torch.optim.Optimizer, *, warmup_steps: int, steps: int) -> dict[str, Any]:
    """Linear warm-up, then a cosine to 0, as ``configure_optimizers`` returns it.

    Args:
        optimizer: whose learning rates are the peak.
        warmup_steps: optimizer steps of warm-up.
        steps: optimizer steps of the whole run.
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

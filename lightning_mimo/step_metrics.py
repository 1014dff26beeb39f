"""What is logged in every step, at a price that a step can pay."""

from __future__ import annotations

import lightning.pytorch as pl
import torch


def log_step_metric(
    module: pl.LightningModule, name: str, value: torch.Tensor | float, *, prog_bar: bool = False
) -> None:
    """``module.log(name, value, on_step=True, on_epoch=False)``, the second and all further times by a shorter way.

    Lightning's checks of a metric that is logged once more as before, and the copies that it makes of what it knows of
    it, take longer than all that is left of a step. From the second batch of an epoch on, the new value takes the place
    of the old one. The progress bar, callbacks and loggers find it where ``log`` would have put it.

    Args:
        module: in a hook in which it may log.
        name: of the metric.
        value: a scalar, the same on every rank.
        prog_bar: whether the progress bar shows it.
    """
    results, hook = module.trainer._results, module._current_fx_name
    key = f"{hook}.{name}"
    # In the first batch of an epoch, log() may have to forget what the metrics were in the one before.
    if results is None or key not in results or module.trainer._logger_connector._first_loop_iter is not False:
        module.log(name, value, prog_bar=prog_bar, on_step=True, on_epoch=False)
        return
    metric = results[key]
    is_tensor = isinstance(value, torch.Tensor)
    # What update() comes to for a value that is logged in steps only, as the type of the first one made sure.
    metric.value = metric._forward_cache = value.detach() if is_tensor else metric.value.new_tensor(value)
    metric.has_reset = False

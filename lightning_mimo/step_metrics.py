"""What is logged in every step, at a price that a step can pay."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch


def log_step_metrics(
    module: pl.LightningModule, values: Mapping[str, torch.Tensor | float], *, prog_bar: bool = False
) -> None:
    """``module.log(name, value, on_step=True, on_epoch=False)`` for each, from the second time on by a shorter way.

    Lightning's checks of a metric that is logged once more as before, and the copies that it makes of what it knows of
    it, take longer than all that is left of a step. From the second batch of an epoch on, the new value takes the place
    of the old one. The progress bar, callbacks and loggers find it where ``log`` would have put it.

    Args:
        module: in a hook in which it may log.
        values: names of metrics and scalars, the same on every rank.
        prog_bar: whether the progress bar shows them.
    """
    results, hook = module.trainer._results, module._current_fx_name
    # In the first batch of an epoch, log() may have to forget what the metrics were in the one before.
    if results is None or module.trainer._logger_connector._first_loop_iter is not False:
        results = {}
    numbers = []
    for name, value in values.items():
        metric = results.get(f"{hook}.{name}")
        if metric is None:
            module.log(name, value, prog_bar=prog_bar, on_step=True, on_epoch=False)
        elif isinstance(value, torch.Tensor):
            _put(metric, value.detach())
        else:
            numbers.append((metric, value))
    if numbers:
        together = numbers[0][0].value.new_tensor([value for _, value in numbers])
        for (metric, _), value in zip(numbers, together.unbind(), strict=True):
            _put(metric, value)


def forget_step_metrics(module: pl.LightningModule, prefix: str) -> None:
    """Of metrics that are not logged in this step: do not log their last values once more.

    Lightning would also go through them at the end of every step. Callbacks and the progress bar keep the last values.

    Args:
        module: in the hook in which they are logged.
        prefix: of their names.
    """
    begin = f"{module._current_fx_name}.{prefix}"
    for key, metric in (module.trainer._results or {}).items():
        if not metric.has_reset and key.startswith(begin):
            metric.has_reset = True


def _put(metric: torch.nn.Module, value: torch.Tensor) -> None:
    """What update() comes to for a value that is logged in steps only, as the type of the first one made sure."""
    vars(metric).update(value=value, _forward_cache=value, has_reset=False)

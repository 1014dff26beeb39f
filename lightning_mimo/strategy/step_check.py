"""Checks what steps and ``loss()`` return, and that a batch is one: errors that say what to write instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_mimo.errors import ConfigError
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.schedule.forward_backward import LossFunction


def check_batch(batch: object, *, stage: str) -> None:
    """Refuse what several DataLoaders at once give.

    Args:
        batch: what Lightning took from the user's loaders.
        stage: "train", "val", "test" or "predict".

    Raises:
        ConfigError: saying what to do with several loaders.
    """
    if isinstance(batch, list) and all(isinstance(microbatch, Mapping) for microbatch in batch):
        return
    advice = (
        "concatenate the datasets (torch.utils.data.ConcatDataset)"
        if stage == "train"
        else "give them as a list, which are run one after the other"
    )
    raise ConfigError(
        f"{stage}_dataloader() returned several DataLoaders at once, so a batch is a {type(batch).__name__} of "
        f"batches. MimoStrategy runs one batch at a time: {advice}."
    )


def checked_step(step: Callable[..., Any], owner: str) -> Callable[..., Any]:
    """Wrap one of the user's steps so that a result in the form of other LightningModules is refused.

    Args:
        step: the step.
        owner: name of the module's class.
    """

    def run(*args: Any) -> Any:
        output = step(*args)
        is_scalar = isinstance(output, torch.Tensor) and output.ndim == 0
        if output is None or is_scalar or (isinstance(output, Mapping) and "loss" in output):
            got = "None" if output is None else "a scalar" if is_scalar else "a dict with 'loss'"
            raise ConfigError(
                f"{owner}.{step.__name__}() returned {got}, but it must return the output of the model, which goes to "
                f"loss(). Write return self(batch), and compute the loss and metrics in loss(self, output, batch)."
            )
        return output

    return run


def checked_loss(loss: LossFunction, owner: str) -> LossFunction:
    """Wrap the user's ``loss`` so that a result of another form is refused with the right one.

    Args:
        loss: the method.
        owner: name of the module's class.
    """

    def run(output: Any, batch: Microbatch) -> Any:
        result = loss(output, batch)
        if isinstance(result, tuple) and len(result) == 3:
            total, tokens, metrics = result
            if _is_number(total) and isinstance(total, torch.Tensor) and _is_number(tokens) and _are_metrics(metrics):
                return result
        raise ConfigError(
            f"{owner}.loss() returned {_described(result)}, but it must return a tuple of three: the sum of the losses "
            f"of all counted tokens (a scalar tensor), the number of these tokens, and metrics, "
            f"{{name: (sum, count)}}. The mean over the global batch is formed later."
        )

    return run


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _are_metrics(metrics: object) -> bool:
    return isinstance(metrics, Mapping) and all(
        isinstance(pair, tuple | list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in metrics.values()
    )


def _described(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} ({', '.join(map(_described, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_described(each)}' for key, each in value.items())}}}"
    if isinstance(value, torch.Tensor):
        return f"a tensor of the shape {list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"

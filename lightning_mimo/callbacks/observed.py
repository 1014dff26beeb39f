"""The interface of MimoStrategy that callbacks use, so that they do not import the strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import lightning.pytorch as pl
import torch

from lightning_mimo.errors import ConfigError
from lightning_mimo.observe.spans import Span, Spans
from lightning_mimo.parallel.infra import MimoModelInfra


class ObservedStrategy(Protocol):
    """The part of MimoStrategy that callbacks use.

    Attributes:
        infra: layout, grids and process groups.
        spans: records of what this rank does.
        step_listeners: functions that are called with the spans of this rank after every optimizer step.
        root_device: device of this rank.
    """

    infra: MimoModelInfra
    spans: Spans

    @property
    def step_listeners(self) -> list[Callable[[list[Span]], None]]: ...

    @property
    def root_device(self) -> torch.device: ...

    def barrier(self, name: str | None = None) -> None: ...


def observed_strategy(trainer: pl.Trainer, asker: object) -> ObservedStrategy:
    """Return the Trainer's strategy as an ObservedStrategy.

    Args:
        trainer: Trainer of the run.
        asker: callback that needs the strategy; named in the error message.

    Raises:
        ConfigError: if the strategy is not MimoStrategy.
    """
    if not hasattr(trainer.strategy, "step_listeners"):
        raise ConfigError(
            f"{type(asker).__name__} works with MimoStrategy only, but the trainer has "
            f"{type(trainer.strategy).__name__}. Leave the callback out, or set strategy=MimoStrategy(...)."
        )
    return cast(ObservedStrategy, trainer.strategy)

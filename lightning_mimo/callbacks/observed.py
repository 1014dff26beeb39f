"""What callbacks of this package ask of the Trainer's strategy, so that they need not import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import lightning.pytorch as pl
import torch

from lightning_mimo.errors import ConfigError
from lightning_mimo.observe.spans import Span, Spans
from lightning_mimo.parallel.infra import MimoModelInfra


class ObservedStrategy(Protocol):
    """The part of MimoStrategy that callbacks look at.

    Attributes:
        infra: layout, grids and process groups.
        spans: what this rank records of itself.
        step_listeners: are called with the spans of this rank after every optimizer step.
        root_device: of this rank.
    """

    infra: MimoModelInfra
    spans: Spans

    @property
    def step_listeners(self) -> list[Callable[[list[Span]], None]]: ...

    @property
    def root_device(self) -> torch.device: ...

    def barrier(self, name: str | None = None) -> None: ...


def observed_strategy(trainer: pl.Trainer, asker: object) -> ObservedStrategy:
    """The Trainer's strategy.

    Args:
        trainer: of the run.
        asker: the callback, for the message.

    Raises:
        ConfigError: if the strategy is not MimoStrategy.
    """
    if not hasattr(trainer.strategy, "step_listeners"):
        raise ConfigError(
            f"{type(asker).__name__} records what MimoStrategy does, but the trainer has "
            f"{type(trainer.strategy).__name__}."
        )
    return cast(ObservedStrategy, trainer.strategy)

"""Arguments of MimoStrategy in groups: what it checks, how it saves, what it watches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, Literal, get_args, get_type_hints

from lightning_mimo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What is checked in every run.

    Args:
        samples: when to check that all ranks hold the same samples: in the first batch of every epoch and evaluation,
            always, or never. It costs one small all-reduce.
        on_nonfinite: what to do where a loss or a gradient is infinite or NaN: raise on all ranks, with the module,
            rank, microbatch and samples in the message, or skip the step, on all ranks alike. A loss scale that is too
            large never raises: the step is skipped and the scale halved.

    Raises:
        ConfigError: for any other value.
    """

    samples: Literal["first", "always", "never"] = "first"
    on_nonfinite: Literal["raise", "skip"] = "raise"

    def __post_init__(self) -> None:
        _check_choices(self)


@dataclass(frozen=True, kw_only=True)
class Saving:
    """How checkpoints are saved.

    Args:
        asynchronous: go on training while a checkpoint is being written; at most one is at a time.
        on_error: what to do where a checkpoint cannot be written: raise on all ranks, or warn and go on.

    Raises:
        ConfigError: for any other value.
    """

    asynchronous: bool = False
    on_error: Literal["raise", "warn"] = "raise"

    def __post_init__(self) -> None:
        _check_choices(self)


@dataclass(frozen=True, kw_only=True)
class Monitoring:
    """What is watched while a run goes on.

    Args:
        telemetry: log what each module does, see :class:`lightning_mimo.observe.telemetry.Telemetry`.
        timeout: how long a rank may wait for another, in a collective or a transfer. After it, every rank says what it
            does and waits for, and the run ends with exit code 1.

    Raises:
        ConfigError: if the timeout is not a positive duration.
    """

    telemetry: bool = True
    timeout: timedelta = timedelta(minutes=30)

    def __post_init__(self) -> None:
        if not isinstance(self.timeout, timedelta) or self.timeout <= timedelta():
            raise ConfigError(
                f"Monitoring(timeout={self.timeout!r}) must be a positive datetime.timedelta, such as "
                f"timedelta(minutes=30); in a config, '0:30:00'."
            )


MOVED = {
    "check_samples": ("checks", "Checks(samples=...)"),
    "on_nonfinite": ("checks", "Checks(on_nonfinite=...)"),
    "async_save": ("saving", "Saving(asynchronous=...)"),
    "on_save_error": ("saving", "Saving(on_error=...)"),
    "telemetry": ("monitoring", "Monitoring(telemetry=...)"),
    "timeout": ("monitoring", "Monitoring(timeout=...)"),
}
"""Arguments of earlier versions: name -> the argument that they are part of now, and what to write for it."""


def key_now(name: str) -> str:
    """The key in a config that has taken the place of an argument in ``MOVED``."""
    argument, written = MOVED[name]
    return f"{argument}.{written.partition('(')[2].partition('=')[0]}"


def refuse_moved[**P](init: Callable[P, None]) -> Callable[P, None]:
    """Have a constructor refuse the arguments in ``MOVED``, each with what to write instead."""

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        for name in kwargs:
            if name in MOVED:
                argument, written = MOVED[name]
                raise ConfigError(f"MimoStrategy({name}=...) has moved: write MimoStrategy({argument}={written}).")
        init(*args, **kwargs)

    return checked


def check_run_ahead(microbatches: Any) -> None:
    """Refuse a run-ahead of encoders that is no number of microbatches.

    Raises:
        ConfigError: naming the argument.
    """
    if not isinstance(microbatches, int) or isinstance(microbatches, bool) or microbatches < 0:
        raise ConfigError(
            f"MimoStrategy(encoder_run_ahead={microbatches!r}) must be a whole number of microbatches, 0 or more."
        )


def _check_choices(options: Any) -> None:
    hints = get_type_hints(type(options))
    for field in fields(options):
        choices, value = get_args(hints[field.name]), getattr(options, field.name)
        if choices and value not in choices:
            raise ConfigError(f"{type(options).__name__}({field.name}={value!r}): choose one of {choices}.")

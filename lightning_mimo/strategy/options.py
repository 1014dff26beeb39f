"""Grouped arguments of MimoStrategy: checks, saving and monitoring."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, Literal, get_args, get_type_hints

from lightning_mimo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Settings of the checks in every run.

    Args:
        samples: when to compare the samples of all ranks one by one before they are used: in the first batch of every
            epoch and evaluation (``first``), or in every batch (``always``), which costs one small all-reduce per
            batch. For all other batches, checksums are part of the single collective of the step, so if ranks hold
            different samples, the run ends after that step at the latest. ``never`` disables both.
        on_nonfinite: reaction to an infinite or NaN loss or gradient: raise an error on all ranks that names the
            module, rank, microbatch and samples, or skip the step on all ranks. Too large a loss scale never raises:
            the step is skipped and the scale is halved.

    Raises:
        ConfigError: for any other value.
    """

    samples: Literal["first", "always", "never"] = "first"
    on_nonfinite: Literal["raise", "skip"] = "raise"

    def __post_init__(self) -> None:
        _check_choices(self)


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Settings of saving checkpoints.

    Args:
        asynchronous: continue training while a checkpoint is being written; at most one is written at a time.
        on_error: reaction if a checkpoint cannot be written: raise on all ranks, or warn and continue.

    Raises:
        ConfigError: for any other value.
    """

    asynchronous: bool = False
    on_error: Literal["raise", "warn"] = "raise"

    def __post_init__(self) -> None:
        _check_choices(self)


@dataclass(frozen=True, kw_only=True)
class Monitoring:
    """Settings of the monitoring of a run.

    Args:
        telemetry: log metrics of each module, see :class:`lightning_mimo.observe.telemetry.Telemetry`.
        timeout: longest time that a rank may wait for another in a collective or a transfer. When it expires, every
            rank reports what it does and waits for, and the run ends with exit code 1.

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
"""Arguments of earlier versions: name -> the argument that now contains it, and its value to write."""


def key_now(name: str) -> str:
    """The config key that has replaced an argument in ``MOVED``."""
    argument, written = MOVED[name]
    return f"{argument}.{written.partition('(')[2].partition('=')[0]}"


def refuse_moved[**P](init: Callable[P, None]) -> Callable[P, None]:
    """Decorate a constructor so that arguments in ``MOVED`` raise an error that gives the replacement."""

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        for name in kwargs:
            if name in MOVED:
                argument, written = MOVED[name]
                raise ConfigError(f"MimoStrategy({name}=...) has moved: write MimoStrategy({argument}={written}).")
        init(*args, **kwargs)

    return checked


def check_batch_options(*, encoder_run_ahead: Any, balance: Any, pack_to: Any) -> None:
    """Check the options of MimoStrategy that say how batches are run.

    Raises:
        ConfigError: if ``encoder_run_ahead`` is not an integer of 0 or more, ``balance`` is not a bool, or ``pack_to``
            is neither an integer of 1 or more nor ``None``.
    """
    if not isinstance(encoder_run_ahead, int) or isinstance(encoder_run_ahead, bool) or encoder_run_ahead < 0:
        raise ConfigError(
            f"MimoStrategy(encoder_run_ahead={encoder_run_ahead!r}) must be a whole number of microbatches, 0 or more."
        )
    if not isinstance(balance, bool):
        raise ConfigError(
            f"MimoStrategy(balance={balance!r}) must be True or False: whether replicas are given even work by the "
            f"costs that the dataset declares."
        )
    if pack_to is not None and (not isinstance(pack_to, int) or isinstance(pack_to, bool) or pack_to < 1):
        raise ConfigError(
            f"MimoStrategy(pack_to={pack_to!r}) must be a whole number of tokens, 1 or more, or None for no packing."
        )


def _check_choices(options: Any) -> None:
    hints = get_type_hints(type(options))
    for field in fields(options):
        choices, value = get_args(hints[field.name]), getattr(options, field.name)
        if choices and value not in choices:
            raise ConfigError(f"{type(options).__name__}({field.name}={value!r}): choose one of {choices}.")

"""Packages that only some data needs."""

from __future__ import annotations

import importlib
from types import ModuleType

from lightning_mimo.errors import ConfigError


def require(module: str, *, what: str, install: str) -> ModuleType:
    """Import a package that is an extra.

    Args:
        module: to import.
        what: needs it, for the message.
        install: what to install with pip.

    Raises:
        ConfigError: if it is not installed, with the command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ConfigError(
            f"{what} needs the package {error.name}, which is not installed: pip install '{install}'"
        ) from None

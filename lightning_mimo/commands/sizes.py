"""Sizes of memory on the command line."""

from __future__ import annotations

import re

from lightning_mimo.errors import ConfigError

_UNITS = {"": 1, "B": 1, "GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20, "TB": 10**12, "TiB": 2**40}


def memory_size(text: str) -> float:
    """Bytes of the value of ``--memory``, such as 80GiB.

    Raises:
        ConfigError: if it is no size, or 0.
    """
    match = re.fullmatch(r"([0-9]+\.?[0-9]*)\s*([A-Za-z]*)", text)
    if match is None or match[2] not in _UNITS or not (size := float(match[1]) * _UNITS[match[2]]):
        raise ConfigError(f"--memory={text}: write a size such as 80GiB or 80GB.")
    return size

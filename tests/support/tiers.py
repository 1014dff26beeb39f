"""Which cases of a test every run has, and which only ``pytest -m exhaustive``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import pytest

exhaustive = partial(pytest.param, marks=pytest.mark.exhaustive)
"""A case of ``parametrize`` that repeats a kind, and is run on request."""


def with_default(cases: Iterable[str], default: Collection[str]) -> list[Any]:
    """Cases of ``parametrize``: those in ``default`` as they are, the others on request."""
    return [case if case in default else exhaustive(case) for case in cases]

"""Shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def seed_stays_in_its_test() -> Iterator[None]:
    """``seed_everything`` leaves its seed in the environment, from where ranks that start later would take it."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)

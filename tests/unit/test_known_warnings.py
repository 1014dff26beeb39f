"""What torch says on import of a machine without a GPU is left out, and nothing else."""

from __future__ import annotations

import logging

import pytest

from lightning_mimo.known_warnings import hush_known_warnings


def test_log_of_torch(caplog: pytest.LogCaptureFixture) -> None:
    hush_known_warnings()
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.propagate = True
    logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local")
    logger.warning("a compiler is missing")
    assert [record.getMessage() for record in caplog.records] == ["a compiler is missing"]

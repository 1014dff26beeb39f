"""Shared by the tests on several nodes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.one_machine import Slurm, SlurmMissingError, slurm
from tests.slurm.short_run import CONFIG, ROOT, shortened


@pytest.fixture(scope="session")
def cluster() -> Iterator[Slurm]:
    if shutil.which("lightning-mimo") is None:
        pytest.skip("there is no lightning-mimo on the PATH")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short, for a socket
    try:
        with slurm(folder, nodes=2) as running:
            yield running
    except SlurmMissingError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of four processes without Slurm."""
    folder = tmp_path_factory.mktemp("one_node")
    command = [sys.executable, "-m", "lightning_mimo", "fit", "--config", CONFIG, *shortened(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return folder

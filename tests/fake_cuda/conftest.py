"""The process that runs the cases; one for a session of tests, ended with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.fake_cuda.host import Host


@pytest.fixture(scope="session")
def fake_gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Runs cases on stubs of CUDA, which are compiled into a temporary folder."""
    from tests.fake_cuda.build import compile_stubs, find_toolchain
    from tests.fake_cuda.host import Host

    toolchain = find_toolchain()
    if isinstance(toolchain, str):
        pytest.skip(toolchain)
    host = Host(compile_stubs(toolchain, tmp_path_factory.mktemp("cuda_stubs")))
    yield host
    host.close()

"""The process that runs the cases; one for a session of tests, ended with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.fake_cuda.host import Host


@pytest.fixture(scope="session")
def fake_gpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Runs cases on stubs of CUDA, which are compiled into a temporary folder."""
    from tests.fake_cuda.build import compile_stubs, find_toolchain
    from tests.fake_cuda.cases import CASES, EXHAUSTIVE, FAULTS
    from tests.fake_cuda.host import Host

    toolchain = find_toolchain()
    if isinstance(toolchain, str):
        pytest.skip(toolchain)
    libraries = compile_stubs(toolchain, tmp_path_factory.mktemp("cuda_stubs"))
    tests = [item for item in request.session.items if item.path.parent == Path(__file__).parent]
    wanted = {item.callspec.params.get("case") for item in tests if hasattr(item, "callspec")}
    if any(item.path.name == "test_faults.py" for item in tests):
        wanted |= FAULTS.keys()
    # With several workers, each has its own folder in that of the session.
    folder = tmp_path_factory.getbasetemp()
    shared = (folder.parent if hasattr(request.config, "workerinput") else folder) / "fake_cuda"
    shared.mkdir(exist_ok=True)
    host = Host(
        libraries,
        shared=shared,
        warning_filters=request.config.getini("filterwarnings"),
        together=[name for name in (CASES | EXHAUSTIVE | FAULTS) if name in wanted],
    )
    yield host
    host.close()

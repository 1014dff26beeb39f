"""The parts of ``python -m tests.gpu`` in which nothing is timed, where there is a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.parts import find_out, parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("name", [name for name, part in parts(Path()).items() if part.together])
def test_part(name: str, tmp_path: Path) -> None:
    figures = find_out(name, parts(tmp_path)[name], tmp_path)
    assert not {key: value for key, value in figures.items() if "FAILED" in key}

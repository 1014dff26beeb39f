"""An estimate for GPUs, against what one allocated at its peak: ``python -m tests.gpu speed`` on an NVIDIA H200."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mimo.planning.gpu_kernels import count_gpu_kernels
from tests.gpu.child import build_trainer
from tests.gpu.model import build_module
from tests.gpu.parts import LARGE
from tests.gpu.predict import estimated_memory
from tests.gpu.run import Run

_RUN = replace(LARGE, accelerator="cpu")


@pytest.mark.parametrize(
    ("run", "measured"),
    [
        pytest.param(_RUN, 40.0578, id="sdpa"),
        pytest.param(replace(_RUN, attention="megatron"), 65.6322, id="megatron", marks=pytest.mark.exhaustive),
        pytest.param(replace(_RUN, recompute=True), 26.4284, id="recomputed", marks=pytest.mark.exhaustive),
    ],
)
def test_memory_is_what_a_gpu_allocated(run: Run, measured: float) -> None:
    """The rest of 0.07 GiB is what the allocator rounds up, and the work space of matrix products."""
    found = estimated_memory(build_module(run), build_trainer(run, []), "cuda")
    assert found.tensors / 2**30 == pytest.approx(measured, rel=0.003)


def test_a_norm_of_a_gpu_is_one_kernel_where_its_weights_have_the_dtype_of_its_input() -> None:
    norm = torch.nn.RMSNorm(8, dtype=torch.float64)
    rows = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    count_gpu_kernels(norm)
    assert "NativeLayerNorm" in type(norm(rows).grad_fn).__name__
    with pytest.warns(UserWarning, match="Cannot dispatch to fused implementation"):
        assert norm(rows.float()).dtype == torch.float32

"""One process on NCCL, everything colocated: the loss curve is that of the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

BFLOAT16_NOISE = 0.05
LARGER = ("--width", "1024", "--layers", "12", "--steps", "20")


def train(accelerator: str, *arguments: str) -> dict[str, Any]:
    """What tests.gpu.train_once prints, in a process of its own."""
    command = [sys.executable, "-m", "tests.gpu.train_once", "--accelerator", accelerator, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def on_cpu() -> list[float]:
    return train("cpu")["losses"]


@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [
        (["--precision", "32-true"], 1e-3),
        (["--precision", "bf16-mixed"], BFLOAT16_NOISE),
        (["--precision", "bf16-mixed", "--overlap"], BFLOAT16_NOISE),
        (["--precision", "bf16-mixed", "--overlap", "--recompute"], BFLOAT16_NOISE),
    ],
    ids=["float32", "bf16", "bf16-overlapped", "bf16-overlapped-recomputed"],
)
def test_loss_curve_is_that_of_the_cpu(on_cpu: list[float], arguments: list[str], tolerance: float) -> None:
    assert train("gpu", *arguments)["losses"] == pytest.approx(on_cpu, rel=tolerance)


def test_larger_model_learns_in_less_memory_when_it_recomputes() -> None:
    kept = train("gpu", "--precision", "bf16-mixed", "--overlap", *LARGER)
    recomputed = train("gpu", "--precision", "bf16-mixed", "--overlap", "--recompute", *LARGER)
    assert recomputed["losses"] == pytest.approx(kept["losses"], rel=BFLOAT16_NOISE)
    assert kept["losses"][-1] < kept["losses"][0]
    assert recomputed["peak_gib"] < kept["peak_gib"]

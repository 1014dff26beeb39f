"""CUDA_DEVICE_MAX_CONNECTIONS is set where megatron-core relies on it, and nowhere else."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from lightning_mimo import MimoLayout, ModuleParallelism
from lightning_mimo.launch.cuda_connections import set_cuda_connections

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def layout(tp: int) -> MimoLayout:
    modules = {"images": ModuleParallelism(), "language": ModuleParallelism(tp=tp, dp=1)}
    return MimoLayout.resolve(modules, world_size=1 + tp)


@pytest.fixture(autouse=True)
def _not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "")  # so that it is put back
    monkeypatch.delenv(NAME)


@pytest.mark.parametrize(
    ("tp", "device", "backend", "found"),
    [(2, GPU, None, "1"), (1, GPU, None, None), (2, CPU, None, None), (2, GPU, "ucc", None), (2, GPU, "nccl", "1")],
)
def test_set_with_tensor_parallelism_on_gpus(
    tp: int, device: torch.device, backend: str | None, found: str | None
) -> None:
    set_cuda_connections(layout(tp), device, backend)
    assert os.environ.get(NAME) == found


def test_what_a_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "32")
    set_cuda_connections(layout(2), GPU, None)
    assert os.environ[NAME] == "32"


def test_too_late_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.warns(RuntimeWarning, match=f"{NAME} is not set, and this process has already used its GPU"):
        set_cuda_connections(layout(2), GPU, None)
    assert NAME not in os.environ
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_cuda_connections(layout(1), GPU, None)

"""What is counted of operations on fake tensors."""

from __future__ import annotations

import torch

from lightning_mimo.observe.spans import Spans
from lightning_mimo.planning.step_recorder import STEP, Exchange, StepRecorder
from lightning_mimo.upstream.torch import FakeTensorMode


def test_traffic_is_that_of_kernels() -> None:
    mode = FakeTensorMode()
    recorder = StepRecorder(mode, Spans(), Exchange(), {})
    with mode, recorder:
        numbers = torch.empty(1000, dtype=torch.float32, device="cpu")
        recorder.counting = True
        for _ in range(2):  # the second time from what is remembered
            numbers + numbers
            assert numbers.device == torch.device("cpu")
            numbers.view(10, 100).transpose(0, 1)
    work = recorder.work("", STEP)
    assert work.operations["elementwise"].count == 2, "neither views nor questions about a tensor are kernels"
    assert work.bytes == 2 * 3 * numbers.nbytes, "two are read, and one is written"
    assert work.flops == 0

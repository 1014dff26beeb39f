"""Without a GPU there is nothing to copy; with one, see tests/fake_cuda."""

from __future__ import annotations

import torch

from lightning_mimo.parallel.host_copies import to_device


def test_nothing_is_copied_on_the_cpu() -> None:
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor

"""A model is built without memory: no values but whole numbers, which code may read."""

from __future__ import annotations

import pytest
import torch

from lightning_mimo.mimo.initialization import fan_in_normal_
from lightning_mimo.planning.fake_world import FakeTensorsOnCpu, OnMeta


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_only_whole_numbers_have_values() -> None:
    with torch.device("meta"), OnMeta():
        weight = torch.empty(4, 3, device="cpu")
        order = torch.arange(6).reshape(2, 3).T.ravel()
        frequencies = torch.arange(0, 8, 2, dtype=torch.float32)
        numbers, halves = torch.tensor([1, 2, 3], device="cuda"), torch.tensor([0.5])
        angles = frequencies * order[:4]
        scaled = weight * numbers
        copied = torch.tensor(frequencies)
        weight[:, 0] = numbers[0]
        for fill in (fan_in_normal_, torch.nn.init.normal_, torch.nn.init.uniform_):
            assert fill(weight) is weight
        assert torch.nn.init.kaiming_uniform_(tensor=weight) is weight
    assert order.tolist() == [0, 3, 1, 4, 2, 5]
    assert numbers.tolist() == [1, 2, 3]
    assert all(each.is_meta for each in (weight, frequencies, halves, angles, scaled, copied))
    assert angles.shape == (4,)
    assert scaled.shape == (4, 3)


def test_whether_there_is_a_gpu_is_what_torch_says() -> None:
    assert FakeTensorsOnCpu().avoid_device_init == (not torch.cuda.is_available())

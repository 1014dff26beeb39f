"""The figures of a step: packed for one all-reduce, unpacked by name, read once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch

from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.optim.step_reduction import DeviceReduction, StepReduction


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    with megatron_on_cpu():
        yield


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def reduction() -> DeviceReduction:
    return StepReduction(
        loss=tensor(6.0),
        tokens=tensor(4.0),
        metrics={"exact": tensor(1.0, 2.0), "asked": tensor(0.0, 0.0)},
        accumulated_loss=tensor(9.0),
        accumulated_tokens=tensor(5.0),
        stops=tensor(1.0),
        group_squares=tensor(0.5, 0.25, 0.125),
        telemetry=tensor(7.0, 8.0),
        positions=tensor(10.0, 9.0),
    )


def test_sum_over_ranks_goes_to_every_field_by_its_name() -> None:
    one = reduction()
    packed = one.pack()
    assert packed.shape == (16,)
    total = one.unpack(packed + packed).read()
    for field in fields(StepReduction):
        here, there = getattr(one.read(), field.name), getattr(total, field.name)
        if field.name == "metrics":
            assert there == {"exact": [2.0, 4.0], "asked": [0.0, 0.0]}
        elif isinstance(here, list):
            assert there == [2 * number for number in here]
        else:
            assert there == 2 * here


def test_what_is_left_out_adds_nothing() -> None:
    nothing = StepReduction()
    assert nothing.pack().tolist() == [0.0] * 5
    assert nothing.read() == StepReduction(
        loss=0.0,
        tokens=0.0,
        accumulated_loss=0.0,
        accumulated_tokens=0.0,
        stops=0.0,
        group_squares=[],
        telemetry=[],
        positions=[],
        samples=[],
        next_samples=[],
    )


def test_means_are_the_same_on_device_and_host() -> None:
    on_device, on_host = reduction(), reduction().read()
    assert on_host.mean_loss == 1.5 == on_device.mean_loss
    assert on_host.metric_means["exact"] == 0.5 == on_device.metric_means["exact"]
    assert math.isnan(on_host.metric_means["asked"])
    assert on_device.metric_means["asked"].isnan()


@pytest.mark.parametrize(("tokens", "mean"), [(0.25, 24.0), (0.0, 6.0)])
def test_mean_loss_of_less_than_one_token(tokens: float, mean: float) -> None:
    few = StepReduction(loss=tensor(6.0), tokens=tensor(tokens))
    assert few.mean_loss == few.read().mean_loss == mean

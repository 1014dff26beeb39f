"""The one rule by which sums over loss tokens become means."""

from __future__ import annotations

import pytest
import torch

from lightning_mimo.mimo_parallel_utils import gradient_scale, loss_divisor


@pytest.mark.parametrize(("tokens", "divisor"), [(7.0, 7.0), (1.0, 1.0), (0.25, 0.25), (1e-3, 1e-3), (0.0, 1.0)])
def test_any_count_but_zero_is_divided_by(tokens: float, divisor: float) -> None:
    on_device = torch.tensor(tokens, dtype=torch.float64)
    assert loss_divisor(tokens) == divisor
    assert loss_divisor(on_device) == divisor
    assert gradient_scale(on_device) == 1 / divisor
    assert gradient_scale(on_device, torch.tensor([256.0])) == 1 / divisor / 256


def test_scale_takes_on_the_dtype_of_gradients() -> None:
    scale = gradient_scale(torch.tensor(3.0, dtype=torch.float64), torch.tensor([2.0]))
    assert (scale.shape, scale.dtype) == ((), torch.float64)
    assert (torch.ones(2) * scale).dtype == torch.float32


@pytest.mark.parametrize("tokens", [-3.0, float("nan")])
def test_gradients_are_not_scaled_by_what_is_no_count(tokens: float) -> None:
    assert gradient_scale(torch.tensor(tokens, dtype=torch.float64)).isnan()

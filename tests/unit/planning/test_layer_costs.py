"""Costs of layers add up to the estimate of a whole step."""

from __future__ import annotations

import pytest

from lightning_mimo import ModuleParallelism
from lightning_mimo.models.sizes import Recompute
from lightning_mimo.planning.layer_costs import LayerSettings
from tests.support.estimates import SIZES, costs_of, estimate

LAYERS = 8


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_costs_of_layers_add_up_to_an_estimate(recompute: bool) -> None:
    (costs,) = costs_of(
        LayerSettings(
            module="language", tp=2, samples=SIZES.samples_per_microbatch, recompute=recompute, sequence_parallel=True
        ),
        layers=LAYERS,
    )
    modules = {"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2, dp=1)}
    options = {"sequence_parallel": True, "recompute": Recompute() if recompute else None}
    _, language = estimate(modules, encoder_run_ahead=0, layers=LAYERS, **options)
    parts = [costs.first, costs.last, *[costs.layer] * costs.num_layers]
    assert costs.num_layers == LAYERS
    for what in ("weights", "gradients", "optimizer"):
        assert sum(getattr(part, what) for part in parts) == pytest.approx(getattr(language.memory, what), rel=0.01)
    for what in ("forward", "backward", "recompute"):
        found = sum(getattr(part.work, what).flops for part in parts)
        assert found == pytest.approx(getattr(language.work["language"], what).flops, rel=1e-6)
    kept = sum(part.kept for part in parts)
    transient = max(part.transient for part in parts)
    # The estimate also holds what the gradients of embeddings and the rest of the rank need.
    assert kept + transient == pytest.approx(language.memory.activations, rel=0.1)

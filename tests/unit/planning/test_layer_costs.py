"""Costs of layers add up to the estimate of a whole step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from megatron.core.models.mimo import MimoModelConfig

from lightning_mimo import MimoModelInfra, ModuleParallelism
from lightning_mimo.models.sizes import Recompute
from lightning_mimo.planning.degrees import stage_layers
from lightning_mimo.planning.layer_costs import LayerSettings
from tests.support.estimates import SIZES, EstimatedModule, costs_of, estimate

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
    # The estimate also holds scratch space and gradients that are being sent; where layers are recomputed, these count.
    assert kept + transient <= language.memory.activations
    assert kept + transient == pytest.approx(language.memory.activations, rel=0.16 if recompute else 0.03)


def test_stages_that_megatron_divides_unevenly() -> None:
    class Uneven(EstimatedModule):
        def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
            self._language = replace(self._language, num_layers=7, first_stage_layers=3)
            return super().configure_mimo(infra)

    configure = Uneven().configure_mimo
    assert stage_layers(configure, {"images": 1, "language": 3}, "language") == (3, 2, 2)
    assert stage_layers(configure, {"images": 2, "language": 3}, "images") == (2, 2)

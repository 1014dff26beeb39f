"""Costs measured on fake tensors, held against what is known of the model."""

from __future__ import annotations

import pytest

from lightning_mimo.commands.plan_model import ModelKeys, PlannedModel
from lightning_mimo.layout.module_parallelism import ModuleParallelism, ResolvedParallelism
from lightning_mimo.planning.candidate import Variant
from lightning_mimo.planning.costs import Message, ModuleCosts, ModuleWork, Operations, PartCosts, Work
from lightning_mimo.planning.model_costs import recomputed
from tests.support.estimates import SIZES, EstimatedModule, strategy_of, trainer_of


def _costs() -> ModuleCosts:
    work = Work(
        operations={"matmul": Operations(flops=100, bytes=10, count=4)},
        messages=(Message(over="tp of language", operation="all_reduce", ranks=(0, 1), bytes=8, count=2),),
    )
    layer = PartCosts(weights=7, kept=50, transient=5, work=ModuleWork(forward=work, backward=work.scaled(2)))
    return ModuleCosts(
        module="language",
        num_layers=4,
        layer=layer,
        first=PartCosts(weights=3),
        last=PartCosts(transient=9),
        boundary_bytes=6,
        output_bytes=12,
    )


def test_recomputation_keeps_the_input_and_runs_forward_again() -> None:
    costs = _costs()
    found = recomputed(costs)
    assert found.layer.kept == costs.boundary_bytes
    assert found.layer.work.recompute == costs.layer.work.forward
    assert found.layer.transient == costs.layer.kept + costs.layer.transient
    assert found.last == costs.last


@pytest.mark.exhaustive
def test_measured_layers_are_those_of_the_model() -> None:
    """Parameters, their state and the arithmetic of matrices, whole and divided over tp."""
    modules = {"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1)}
    trainer = trainer_of(strategy_of(modules), ranks=2, max_steps=2)
    keys = ModelKeys(recompute=(), sequence_parallel=())
    subject = PlannedModel(lambda values: EstimatedModule(layers=8), trainer, keys)
    model = subject.model
    assert model.trains == {"images": True, "language": True} and model.tokens == SIZES.tokens
    costs = model.costs
    tokens, width = SIZES.tokens, SIZES.hidden
    for tp in (1, 2):
        sizes = ResolvedParallelism(tp=tp, dp=1, rank_offset=0)
        found = costs("language", sizes, Variant(recompute=frozenset(), sequence_parallel=False), 1)
        assert found.num_layers == 8
        matrices = 12 * width**2
        assert found.layer.weights == pytest.approx(4 * matrices / tp, rel=0.05)
        assert found.layer.optimizer == pytest.approx(2 * found.layer.weights, rel=0.01)
        expected = 2 * tokens * matrices / tp
        assert found.layer.work.forward.operations["matmul"].flops == pytest.approx(expected, rel=1e-6)
        assert found.layer.work.backward.operations["matmul"].flops == pytest.approx(2 * expected, rel=1e-6)
        assert bool(found.layer.work.forward.messages) == (tp > 1)
    one = ResolvedParallelism(dp=1, rank_offset=0)
    images = costs("images", one, Variant(recompute=frozenset(), sequence_parallel=False), 2)
    assert images.output_bytes == 2 * SIZES.tokens_per_image * width * 4

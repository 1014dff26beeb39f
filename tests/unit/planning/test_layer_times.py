"""Layers that run for real, by a clock that only they move, so that it is known how long they take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from lightning_mimo import ModuleParallelism
from lightning_mimo.planning import layer_times
from lightning_mimo.planning.layer_costs import LayerCosts, LayerSettings
from lightning_mimo.planning.layer_times import TimedLayerCosts
from lightning_mimo.strategy.program import training_program
from tests.support.estimates import SIZES, EqualSamples, EstimatedModule, strategy_of, trainer_of

SECONDS = 0.004  # of a forward pass for each sample
TICK = 1e-6  # seconds between two looks at the clock
CPU = torch.device("cpu")


@contextmanager
def timed(*, precision: str = "32-true", flops: float = 1e15, **model: Any) -> Iterator[TimedLayerCosts]:
    modules = {"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1)}
    strategy = strategy_of(modules, precision=precision)
    with training_program(EstimatedModule(**model), trainer_of(strategy, ranks=2, max_steps=2)) as program:
        policy = strategy.precision_plugin.dtype_policy
        costs = LayerCosts(program, EqualSamples()[0], modules=modules, dtype_policy=policy)
        yield TimedLayerCosts(costs, device=CPU, flops=flops, dtype_policy=policy)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, torch.Size, torch.dtype]]:
    """Shapes of inputs and of the first weight of the MLP of layers that ran for real, which move the clock."""
    seen: list[tuple[torch.Size, torch.Size, torch.dtype]] = []
    forward, now = TransformerLayer.forward, 0.0

    def clock() -> float:
        nonlocal now
        now += TICK
        return now

    def timed_forward(layer: Any, hidden_states: torch.Tensor, **options: Any) -> Any:
        nonlocal now
        if type(hidden_states) is torch.Tensor:  # no fake one
            seen.append((hidden_states.shape, layer.mlp.linear_fc1.weight.shape, hidden_states.dtype))
            now += SECONDS * hidden_states.size(1)
        return forward(layer, hidden_states, **options)

    monkeypatch.setattr(TransformerLayer, "forward", timed_forward)
    monkeypatch.setattr(layer_times, "time", SimpleNamespace(perf_counter=clock))
    return seen


def test_a_layer_is_timed_at_the_shapes_of_the_plan(seen: list[Any]) -> None:
    with timed(sequence_parallel=True) as costs:
        one, ten = (costs(LayerSettings(module="language", tp=2, samples=samples)) for samples in (1, 10))
        assert costs.timed == 2 and not costs.priced
    # The sequence is divided over tp between layers, and so is the MLP.
    shapes = {(SIZES.tokens // 2, samples, SIZES.hidden) for samples in (1, 4)}
    assert {tuple(shape) for shape, _, _ in seen} == shapes
    assert {tuple(weight) for _, weight, _ in seen} == {(4 * SIZES.hidden // 2, SIZES.hidden)}
    assert one.layer.seconds is not None and ten.layer.seconds is not None
    assert one.layer.seconds.forward == pytest.approx(SECONDS + TICK)
    assert ten.layer.seconds.forward == pytest.approx(10 * SECONDS + TICK)
    assert one.layer.seconds.backward == pytest.approx(TICK)
    assert one.first.seconds is None and one.last.seconds is None


@pytest.mark.exhaustive
def test_mixed_precision_and_an_encoder(seen: list[Any]) -> None:
    with timed(precision="bf16-mixed") as costs:
        found = costs(LayerSettings(module="images"))
    assert found.layer.seconds is not None and found.layer.seconds.forward >= SECONDS
    assert {dtype for _, _, dtype in seen} == {torch.bfloat16}


def test_what_is_too_slow_or_has_no_layers_is_priced(seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_times, "LONGEST", SECONDS)
    with timed() as costs:
        assert costs(LayerSettings(module="language")).layer.seconds is None
        assert "one takes" in costs.priced["language"] and "1 samples, tp=1" in costs.priced["language"]
        runs = len(seen)
        assert costs(LayerSettings(module="language", tp=2)).layer.seconds is None
        assert len(seen) == runs, "nothing more is tried for the module"
    with timed(flops=1e3) as costs:  # a slow device on which nothing is tried
        assert costs(LayerSettings(module="language")).layer.seconds is None
        assert "one would take about" in costs.priced["language"] and len(seen) == runs
    with timed(layers=1) as costs:
        assert costs(LayerSettings(module="images")).layer.seconds is None
        assert costs.priced == {"images": "the module has no TransformerConfig of several layers"}

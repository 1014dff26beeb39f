"""Costs of transformers by formula, for tests of what is made of costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from lightning_mimo.layout.module_parallelism import ResolvedParallelism
from lightning_mimo.planning.candidate import Model, Variant
from lightning_mimo.planning.costs import Message, ModuleCosts, ModuleWork, Operations, PartCosts, Work


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Sizes of a module.

    Attributes:
        layers: transformer layers.
        hidden: width; the MLP is four times as wide.
        tokens: per sample.
        output: width of what it gives.
    """

    layers: int
    hidden: int
    tokens: int
    output: int


def formula_model(modules: Mapping[str, Transformer], *, global_batch_size: int) -> Model:
    """A model in bfloat16 whose layers have 12 * hidden ** 2 weights, in mixed precision with Adam."""

    @cache
    def costs(name: str, tp: int, recompute: bool, samples: int) -> ModuleCosts:
        size = modules[name]
        tokens, weights = samples * size.tokens, 12 * size.hidden**2 // tp
        activation = 2 * tokens * size.hidden
        peers = Message(over="tp", operation="all_reduce", ranks=tuple(range(tp)), bytes=2 * activation, count=2)

        def work(times: int) -> Work:
            matmul = Operations(flops=times * 2 * tokens * weights, bytes=times * 2 * weights, count=6 * times)
            attention = Operations(
                flops=times * 4 * tokens * size.tokens * size.hidden // tp, bytes=activation, count=1
            )
            norms = Operations(bytes=times * 12 * activation, count=12 * times)
            operations = {"matmul": matmul, "attention": attention, "elementwise": norms}
            return Work(operations=operations, messages=(peers,) if tp > 1 else ())

        layer = PartCosts(
            weights=2 * weights,
            gradients=4 * weights,
            optimizer=12 * weights,
            gradient_bytes=4 * weights,
            kept=activation if recompute else 17 * activation,
            transient=17 * activation,
            work=ModuleWork(forward=work(1), backward=work(2), recompute=work(1) if recompute else Work()),
        )
        return ModuleCosts(
            module=name,
            num_layers=size.layers,
            layer=layer,
            first=PartCosts(),
            last=PartCosts(),
            boundary_bytes=activation,
            output_bytes=2 * tokens * size.output,
        )

    def costs_of(name: str, sizes: ResolvedParallelism, variant: Variant, samples: int) -> ModuleCosts:
        return costs(name, sizes.tp, name in variant.recompute, samples)

    return Model(
        costs=costs_of,
        global_batch_size=global_batch_size,
        tokens=modules["language"].tokens,
        dtype="bfloat16",
        trains=dict.fromkeys(modules, True),
    )

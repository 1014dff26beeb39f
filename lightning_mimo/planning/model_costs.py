"""Costs of the modules of a model for any tp, ep and microbatch, as a search asks for them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from lightning_mimo.layout.module_parallelism import ResolvedParallelism
from lightning_mimo.planning.candidate import Variant
from lightning_mimo.planning.costs import ModuleCosts
from lightning_mimo.planning.layer_costs import LayerSettings


class ModelCosts:
    """Costs of modules, measured without recomputation when they are first asked for."""

    def __init__(self, layer_costs: Callable[[LayerSettings], ModuleCosts], *, recomputable: Collection[str]) -> None:
        """
        Args:
            layer_costs: measures the costs of layers, as ``LayerCosts`` or, with their seconds besides.
            recomputable: modules for which recomputation can be chosen; others do what the model says.
        """
        self._layer_costs, self._recomputable = layer_costs, frozenset(recomputable)
        self._known: dict[tuple[object, ...], ModuleCosts] = {}

    def __call__(self, name: str, sizes: ResolvedParallelism, variant: Variant, samples: int) -> ModuleCosts:
        """Costs of a module on one rank for a microbatch. torch.distributed must not be initialized in this process.

        Raises:
            LayoutError: if the model does not support the sizes.
        """
        may_recompute = name in self._recomputable
        settings = LayerSettings(
            module=name,
            tp=sizes.tp,
            ep=sizes.ep,
            expt_tp=sizes.expt_tp,
            samples=samples,
            recompute=False if may_recompute else None,
        )
        key = settings, may_recompute and name in variant.recompute
        if key not in self._known:
            found = self._layer_costs(settings)
            self._known[key] = recomputed(found) if key[1] else found
        return self._known[key]


def recomputed(costs: ModuleCosts) -> ModuleCosts:
    """The costs with full recomputation of every layer, which keeps a layer's input and runs its forward pass again."""
    layer = costs.layer
    again = replace(
        layer,
        kept=costs.boundary_bytes,
        transient=layer.kept + layer.transient,
        work=replace(layer.work, recompute=layer.work.forward),
    )
    return replace(costs, layer=again)

"""Finds the parallel sizes that a model supports by describing it in small layouts, which its own checks refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from megatron.core.transformer.transformer_block import get_num_layers_to_build

from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE, ModuleParallelism, dp_step_of_experts
from lightning_mimo.planning.depths import depths_of, transformer_of, transformers_of
from lightning_mimo.planning.fake_world import Configure, as_rank
from lightning_mimo.planning.layouts import Degrees, divisors

_MOST_UNEVEN = 16
"""Largest number of pipeline stages that is tried although it does not divide the layers."""

Check = Callable[[MimoLayout], None]
"""Raises a ConfigError if a model does not fit a layout, as ``MimoModule.check_layout``."""


def degrees_of(
    configure: Configure, check: Check, modules: Iterable[str], *, world_size: int, largest_tp: int
) -> dict[str, Degrees]:
    """Parallel sizes of every module, each tried with all other sizes at 1.

    torch.distributed must not be initialized in this process.

    Args:
        configure: describes the model, as ``MimoModule.configure_mimo``.
        check: checks the model against a layout.
        modules: module names, in the order of their ranks.
        world_size: number of devices; larger sizes are not tried.
        largest_tp: largest tensor-parallel size.

    Raises:
        ConfigError: if the model fits no layout at all.
    """
    names = list(modules)
    alone = {name: ModuleParallelism(dp=1) for name in names}
    layers, experts = _layers_and_experts(configure, _layout(alone), names)

    def fits(name: str, sizes: ModuleParallelism) -> bool:
        tried = {**alone, name: sizes}
        dp = dp_step_of_experts(sizes)
        layout = _layout({each: replace(size, dp=dp) for each, size in tried.items()})
        try:
            check(layout)
            with as_rank(layout, layout.modules[name].ranks.start) as infra:
                configure(infra)
        except ConfigError:
            return False
        return True

    def supported(name: str, axis: str, sizes: Iterable[int]) -> tuple[int, ...]:
        return (1, *(n for n in sizes if 1 < n <= world_size and fits(name, ModuleParallelism(**{axis: n}))))

    return {
        name: Degrees(
            tp=supported(name, "tp", range(2, largest_tp + 1)),
            pp=supported(name, "pp", _numbers_of_stages(layers.get(name, 1))),
            ep=supported(name, "ep", divisors(experts)) if name == LANGUAGE else (1,),
        )
        for name in names
    }


def stage_layers(configure: Configure, pp: Mapping[str, int], module: str) -> tuple[int, ...] | None:
    """Layers of each pipeline stage of a module, as megatron-core divides them; ``None`` if its stages do not tell.

    torch.distributed must not be initialized in this process.

    Args:
        configure: describes the model, as ``MimoModule.configure_mimo``.
        pp: pipeline-parallel size of every module, in the order of their ranks.
        module: one of them.
    """
    layout = _layout({name: ModuleParallelism(dp=1, pp=size) for name, size in pp.items()})
    with as_rank(layout, layout.modules[module].ranks.start) as infra:
        found = transformers_of(configure(infra), module)
    # A projector's config has as many layers as there are stages, because megatron-core accepts no fewer.
    transformer = max(found, key=lambda each: each.num_layers, default=None)
    if transformer is None:
        return None
    return tuple(get_num_layers_to_build(transformer, pp_rank=stage) for stage in range(pp[module]))


def _numbers_of_stages(layers: int) -> list[int]:
    """Numbers of pipeline stages to try: those that divide the layers, and small ones, whose stages may differ."""
    return sorted({*divisors(layers), *range(1, min(layers, _MOST_UNEVEN) + 1)})


def _layers_and_experts(configure: Configure, layout: MimoLayout, names: list[str]) -> tuple[Mapping[str, int], int]:
    """Layers of the modules whose layers are alike, and experts of the language module."""
    layers: dict[str, int] = {}
    experts = 1
    for name in names:
        with as_rank(layout, layout.modules[name].ranks.start) as infra:
            config = configure(infra)
        layers |= {each: depth.layers for each, depth in depths_of(config, {name: 0}).items()}
        transformer = transformer_of(config, name)
        if name == LANGUAGE and transformer is not None:
            experts = transformer.num_moe_experts or 1
    return layers, experts


def _layout(modules: Mapping[str, ModuleParallelism]) -> MimoLayout:
    return MimoLayout.resolve(modules, world_size=sum(sizes.size for sizes in modules.values()))

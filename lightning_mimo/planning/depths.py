"""Models with fewer layers, and what follows from two of them for all layers, because layers are alike."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.models.mimo import MimoModelConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.planning.fake_world import Configure

# Layers of the smaller model. Where a pass may free what an earlier layer held, the first and the last one of a stage
# differ in what is alive around them.
_FEW = 2
_FEW_OF_KEPT = 1


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Layers of one module on one pipeline stage: all of them, and those of two smaller models.

    Attributes:
        layers: of the real model.
        few: of the smaller one of the two.
        more: of the other one.
    """

    layers: int
    few: int
    more: int

    @property
    def factor(self) -> float:
        """How often the difference of the two models is to be added to the smaller one."""
        return (self.layers - self.few) / (self.more - self.few)


def depths_of(config: MimoModelConfig, stages: Mapping[str, int], *, trained: Container[str] = ()) -> dict[str, Depth]:
    """Module -> its depths on a rank; without modules whose layers are few or not alike.

    Args:
        config: describes the model.
        stages: module -> its pipeline stage on the rank.
        trained: modules that have no frozen parameter on the rank, so that every layer is alike in what it keeps for
            the backward pass. A single layer stands for those of them that have no experts.
    """
    found = {}
    for name, stage in stages.items():
        transformer = transformer_of(config, name)
        if transformer is None or not _are_alike(transformer, _spec_of(config, name)):
            continue
        layers = get_num_layers_to_build(transformer, pp_rank=stage)
        step = _step(transformer, layers)
        least = _FEW_OF_KEPT if name in trained and not transformer.num_moe_experts else _FEW
        few = layers % step
        while few < least:
            few += step
        if few + 2 * step < layers:
            found[name] = Depth(layers=layers, few=few, more=few + step)
    return found


def with_layers(configure: Configure, layout: MimoLayout, layers: Mapping[str, int]) -> Configure:
    """Like ``configure``, with fewer layers on each pipeline stage.

    Args:
        configure: describes the model.
        layout: the layout.
        layers: module -> layers on each of its stages; other modules keep theirs.
    """
    return partial(_configure, configure, layout, dict(layers)) if layers else configure


def _configure(
    configure: Configure, layout: MimoLayout, layers: Mapping[str, int], infra: MimoModelInfra
) -> MimoModelConfig:
    config = configure(infra)
    for name, number in layers.items():
        transformer = transformer_of(config, name)
        assert transformer is not None, "depths_of() has found it"
        transformer.num_layers = number * layout.modules[name].pp
        transformer.num_layers_in_first_pipeline_stage = transformer.num_layers_in_last_pipeline_stage = None
        for block in _blocks_in(_spec_of(config, name)):
            del block.layer_specs[number:]
    return config


def _spec_of(config: MimoModelConfig, module: str) -> ModuleSpec:
    return config.language_model_spec if module == LANGUAGE else config.modality_submodules_spec[module]


def transformer_of(config: MimoModelConfig, module: str) -> TransformerConfig | None:
    """The config of a module's only transformer with several layers."""
    found = transformers_of(config, module)
    return found[0] if len(found) == 1 else None


def transformers_of(config: MimoModelConfig, module: str) -> list[TransformerConfig]:
    """The configs of a module with several layers."""
    found = {id(each): each for each in _of_type(TransformerConfig, _spec_of(config, module)) if each.num_layers > 1}
    return list(found.values())


def _blocks_in(spec: ModuleSpec) -> list[TransformerBlockSubmodules]:
    return list({id(each): each for each in _of_type(TransformerBlockSubmodules, spec)}.values())


def _are_alike(transformer: TransformerConfig, spec: ModuleSpec) -> bool:
    by_number = (transformer.window_attn_skip_freq, transformer.no_rope_freq, transformer.linear_attention_freq)
    differs = any(each is not None for each in by_number) or transformer.moe_layer_freq not in (1, None)
    specs = [{id(layer) for layer in block.layer_specs or ()} for block in _blocks_in(spec)]
    return not differs and all(len(each) == 1 for each in specs)


def _step(transformer: TransformerConfig, layers: int) -> int:
    """Number of layers that are recomputed together."""
    number = transformer.recompute_num_layers or 1
    if transformer.recompute_granularity != "full":
        return 1
    if transformer.recompute_method == "uniform":
        return min(number, layers)
    return 1 if number >= layers else layers  # of the blocks, the first ones differ from the others


def _of_type[T](kind: type[T], value: Any) -> Iterator[T]:
    if isinstance(value, kind):
        yield value
    elif isinstance(value, ModuleSpec):
        yield from _of_type(kind, [value.params, value.submodules])
    elif isinstance(value, dict):
        yield from _of_type(kind, list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _of_type(kind, each)

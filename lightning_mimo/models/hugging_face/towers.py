"""Vision encoders by the model_type of their config; any that is not registered is taken from transformers as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from lightning_mimo.errors import LayoutError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.models.hugging_face.clip import clip_tower, siglip_tower
from lightning_mimo.models.hugging_face.config_values import refuse
from lightning_mimo.models.hugging_face.decoder import BuildOptions
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.weights.rules import Rename, Rule, Source


class Tower(Protocol):
    """A vision encoder: how it is built, and the rules of its weights."""

    @property
    def width(self) -> int:
        """Of a feature."""

    def check(self, layout: MimoLayout, module: str) -> None:
        """Refuse a layout."""

    def encoder_spec(self, infra: MimoModelInfra, module: str, options: BuildOptions) -> ModuleSpec:
        """ModuleSpec of the encoder, which gives ``[n, tokens, width]`` of ``pixel_values``."""

    def rules(self, target: str, source: str, shapes: Mapping[str, Sequence[int]]) -> list[Rule]:
        """Rules of its weights, given both prefixes and the shapes of the files' tensors."""

    def kept(self, source: str) -> list[str]:
        """Patterns of the tensors that it has no use for."""


class TowerFamily(Protocol):
    def __call__(self, config: Any, *, layer: int, drop_first: bool) -> Tower: ...


_FAMILIES: dict[str, TowerFamily] = {}


def register_tower(model_type: str, family: TowerFamily) -> None:
    """Add a family of vision encoders, or replace one.

    Args:
        model_type: as in the ``vision_config`` of a ``config.json``.
        family: as :func:`tower_of`.
    """
    _FAMILIES[model_type] = family


def tower_of(config: Any, *, layer: int, drop_first: bool) -> Tower:
    """The encoder of a vision config.

    Args:
        config: of transformers.
        layer: after how many layers the hidden states are taken.
        drop_first: leave the first token out.
    """
    family = _FAMILIES.get(config.model_type, TransformersTower)
    return family(config, layer=layer, drop_first=drop_first)


def check_undivided(layout: MimoLayout, module: str, model_type: str) -> None:
    """Refuse to divide an encoder that is taken from transformers.

    Raises:
        LayoutError: unless tp and pp are 1.
    """
    sizes = layout.modules[module]
    if sizes.tp > 1 or sizes.pp > 1:
        raise LayoutError(
            f"Module {module!r}: tp={sizes.tp}, pp={sizes.pp}, but an encoder of the kind {model_type!r} is "
            f"taken from transformers as it is, which cannot be divided. Set tp=1 and pp=1, and as many dp as you like."
        )


class HiddenStates(torch.nn.Module):
    """A vision model of transformers, of which the hidden states after one layer are taken."""

    def __init__(self, config: Any, layer: int, drop_first: bool) -> None:
        super().__init__()
        from transformers import AutoModel  # an extra; only what is in the package itself is ever built

        self.tower = AutoModel.from_config(config)
        self._layer = layer
        self._drop_first = drop_first

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``[n, channels, height, width] -> [n, tokens, hidden]``"""
        output = self.tower(pixel_values=pixel_values, output_hidden_states=True)
        return output.hidden_states[self._layer][:, int(self._drop_first) :]


class TransformersTower:
    """A vision model of transformers as it is: every rank of its module holds all of it."""

    def __init__(self, config: Any, *, layer: int, drop_first: bool) -> None:
        self._config = config
        self._layer = layer
        self._drop_first = drop_first

    @property
    def width(self) -> int:
        return self._config.hidden_size

    def check(self, layout: MimoLayout, module: str) -> None:
        """
        Raises:
            LayoutError: unless tp and pp are 1.
        """
        check_undivided(layout, module, self._config.model_type)

    def encoder_spec(self, infra: MimoModelInfra, module: str, options: BuildOptions) -> ModuleSpec:
        params = {"config": self._config, "layer": self._layer, "drop_first": self._drop_first}
        return ModuleSpec(module=HiddenStates, params=params)

    def rules(self, target: str, source: str, shapes: Mapping[str, Sequence[int]]) -> list[Rule]:
        return [
            Rename(f"{target}tower.{name}", Source(name=f"{source}{in_files}", shape=tuple(shape)))
            for in_files, (name, shape) in names_in_files(self._config).items()
        ]

    def kept(self, source: str) -> list[str]:
        return []


def names_in_files(config: Any) -> dict[str, tuple[str, torch.Size]]:
    """Name of a tensor in files -> name and shape of the parameter in transformers' model. Builds it without memory."""
    from transformers import AutoModel

    with torch.device("meta"):
        parameters = dict(AutoModel.from_config(config).named_parameters())
        try:
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError:  # transformers 4 has the same names in both
            return {name: (name, parameter.shape) for name, parameter in parameters.items()}
        in_files = revert_weight_conversion(AutoModel.from_config(config), dict(parameters))
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    if missing := [name for name, tensor in in_files.items() if id(tensor) not in name_of]:
        raise refuse(
            config, f"the tensor {missing[0]!r}, which transformers computes from others when it loads,", "Use another."
        )
    return {name: (name_of[id(tensor)], tensor.shape) for name, tensor in in_files.items()}


register_tower("clip_vision_model", clip_tower)
register_tower("siglip_vision_model", siglip_tower)

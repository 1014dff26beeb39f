"""ModuleSpec that uses any torch module as the encoder of a modality."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from lightning_mimo.errors import ConfigError
from lightning_mimo.parallel.infra import MimoModelInfra


def encoder_spec(
    infra: MimoModelInfra,
    module: str,
    encoder: Callable[..., torch.nn.Module],
    *,
    options: Mapping[str, Any] | None = None,
    projector: Callable[[], torch.nn.Module] | None = None,
    name: str = "encoder",
) -> ModuleSpec:
    """ModuleSpec of a modality with one encoder, for ``MimoModelConfig(modality_submodules_spec={module: ...})``.

    Example::

        encoder_spec(infra, "images", ViT, options={"layers": 12}, projector=lambda: torch.nn.Linear(768, 4096))

    Args:
        infra: grids and process groups of this rank.
        module: name of the module in the layout. Its tp and pp must be 1, unless the encoder implements them itself.
        encoder: class of the encoder, or a function that makes it; called with ``options`` on the ranks of the module
            only. The encoder's ``forward`` receives the entries of ``modality_inputs[module][name]`` as keyword
            arguments, concatenated over all items of a microbatch. It returns ``[items, tokens, width]`` or ``[rows,
            width]``; without a projector, the width is the hidden size of the language module.
        options: keyword arguments of ``encoder``.
        projector: makes the module that takes the encoder's features, ``[rows, width] -> [rows, hidden]``. Its
            parameters lie under ``module.input_projections``, those of the encoder under ``module.encoders``.
        name: key of the encoder in ``modality_inputs``.
    """
    parts: dict[str, Any] = {"encoders": {name: _spec_of(encoder, options or {})}}
    if projector is not None:
        parts["input_projections"] = [_spec_of(projector, {})]
    return ModuleSpec(
        module=VisionModalitySubmodules, params={"pg_collection": infra.pg_collections.get(module)}, submodules=parts
    )


def _spec_of(make: Callable[..., torch.nn.Module], options: Mapping[str, Any]) -> ModuleSpec:
    return ModuleSpec(module=_Made, params={"make": make, "options": dict(options)})


class _Made:
    """Megatron-core makes instances of classes only and would take a function for the module itself."""

    def __new__(cls, make: Callable[..., torch.nn.Module], options: Mapping[str, Any]) -> Any:
        made = make(**options)
        if not isinstance(made, torch.nn.Module):
            raise ConfigError(f"{make!r} made a {type(made).__name__}, which is no torch.nn.Module.")
        return made

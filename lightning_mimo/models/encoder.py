"""ModuleSpec that uses any torch module as the encoder of a modality."""

from __future__ import annotations

import torch
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from lightning_mimo.parallel.infra import MimoModelInfra


def encoder_spec(
    infra: MimoModelInfra, module: str, encoder: type[torch.nn.Module], *, name: str = "encoder"
) -> ModuleSpec:
    """ModuleSpec of a modality with one encoder, for ``MimoModelConfig(modality_submodules_spec={module: ...})``.

    Args:
        infra: grids and process groups of this rank.
        module: name of the module in the layout. Its tp and pp must be 1, unless the encoder implements them itself.
        encoder: class of the encoder, constructed without arguments, on the ranks of the module only. Its ``forward``
            receives the entries of ``modality_inputs[module][name]`` as keyword arguments, concatenated over all items
            of a microbatch. It returns ``[items, tokens, hidden]`` or ``[rows, hidden]``, with the hidden size of the
            language module.
        name: key of the encoder in ``modality_inputs``.
    """
    return ModuleSpec(
        module=VisionModalitySubmodules,
        params={"pg_collection": infra.pg_collections.get(module)},
        submodules={"encoders": {name: ModuleSpec(module=encoder)}},
    )

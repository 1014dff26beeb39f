"""Encoder of patches that is shared by the image and audio models, on one or several pipeline stages."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from megatron.core.models.mimo.submodules.base import ModalitySubmodules
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.models.vision.vit_layer_specs import (
    get_vit_layer_with_local_spec,
    get_vit_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo.layers.attention import AttentionKind, SdpaAttention


class Patches(Protocol):
    """Division of an item (an image, a clip) into patches and language tokens."""

    @property
    def num_patches(self) -> int:
        """Number of patches of one item."""

    @property
    def values_per_patch(self) -> int:
        """Number of values in one patch."""

    @property
    def tokens_per_item(self) -> int:
        """Number of language tokens of one item."""

    @property
    def patches_per_token(self) -> int:
        """Number of consecutive patches that are concatenated into one token."""


class PatchEncoder(MegatronModule):
    """Transformer over patches: linear embedding and learned positions -> layers -> concatenation of patches to tokens.

    Each token is the concatenation of ``patches_per_token`` consecutive patches. If ``pg_collection.pp`` has several
    ranks, this is one pipeline stage of the encoder.
    """

    def __init__(
        self,
        transformer_config: TransformerConfig,
        patches: Patches,
        pg_collection: ProcessGroupCollection,
        attention: AttentionKind = "sdpa",
    ) -> None:
        super().__init__(config=transformer_config)
        self.patches = patches
        self._first = pg_collection.pp.rank() == 0
        self._last = pg_collection.pp.rank() == pg_collection.pp.size() - 1
        if self._first:
            dtype, device = transformer_config.params_dtype, torch.cuda.current_device()
            self.patch_embedding = torch.nn.Linear(
                patches.values_per_patch, transformer_config.hidden_size, dtype=dtype, device=device
            )
            self.positions = torch.nn.Parameter(
                torch.empty(patches.num_patches, transformer_config.hidden_size, dtype=dtype, device=device)
            )
            torch.nn.init.normal_(self.positions, std=transformer_config.embedding_init_method_std)
        self.decoder = TransformerBlock(
            config=transformer_config,
            spec=vit_layer(attention),
            pre_process=self._first,
            post_process=self._last,
            pg_collection=pg_collection,
        )

    def encode(self, patches: torch.Tensor | None, hidden_states: torch.Tensor | None) -> torch.Tensor:
        """Encode items, or continue from the previous stage.

        Args:
            patches: ``[n, patches, values_per_patch]``, on the first stage; n may be 0.
            hidden_states: ``[patches, n, hidden]`` from the previous stage, on later stages.

        Returns:
            ``[n, tokens_per_item, patches_per_token * hidden]`` on the last stage, otherwise ``[patches, n, hidden]``.
        """
        if self._first:
            hidden_states = self.patch_embedding(patches) + self.positions
            hidden_states = hidden_states.transpose(0, 1).contiguous()
        else:
            self.decoder.set_input_tensor(hidden_states)
            hidden_states = None
        hidden_states = self.decoder(hidden_states, attention_mask=None)
        if not self._last:
            return hidden_states
        # Transpose to [n, patches, hidden] before flattening: otherwise samples would get features of other samples.
        return hidden_states.transpose(0, 1).reshape(hidden_states.size(1), self.patches.tokens_per_item, -1)


def vit_layer(attention: AttentionKind) -> ModuleSpec:
    """ModuleSpec of a layer in which every token attends to every other."""
    if attention == "te":
        return get_vit_layer_with_transformer_engine_spec()
    layer = get_vit_layer_with_local_spec()
    if attention == "sdpa":
        layer.submodules.self_attention.submodules.core_attention = SdpaAttention
    return layer


class PipelinedSubmodules(ModalitySubmodules):
    """Modality whose encoder may span pipeline stages; upstream's classes skip the encoder on later stages.

    An encoder that takes ragged items passes ``[rows, 1, hidden]`` to the next stage and returns ``[rows, hidden]`` on
    its last stage. On later stages it also receives the arguments that are named in its ``item_sizes.every_stage``.

    Attributes:
        stage_arguments: argument name -> int64 ``[items, n]``, for the next forward pass of a later stage.
    """

    stage_arguments: Mapping[str, torch.Tensor] = MappingProxyType({})

    def forward(
        self, encoder_inputs: dict[str, Any] | None = None, hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Run this stage's part of the encoder; on one stage the same as upstream's.

        Args:
            encoder_inputs: encoder name -> its arguments, on the first stage; ``None`` if there are no items.
            hidden_states: activations from the previous stage, on later stages.

        Returns:
            Activations for the next stage, or on the last stage the projected embeddings; ``None`` without inputs.
        """
        if self.is_first_stage and self.is_last_stage:
            return super().forward(encoder_inputs=encoder_inputs, hidden_states=hidden_states)
        (name, encoder), *others = self.encoders.items()
        assert not others, "a pipelined modality has one encoder"
        if self.is_first_stage:
            return None if encoder_inputs is None else encoder(**encoder_inputs[name])
        assert hidden_states is not None, "later stages continue from the previous one"
        if hidden_states.ndim == 2:
            return hidden_states  # MimoModel's empty output: no items on the previous stages
        output = encoder(hidden_states=hidden_states, **self.stage_arguments)
        if not self.is_last_stage:
            return output
        return self.project_embeddings([output.reshape(-1, output.size(-1))], is_input=True)


def modality_spec(
    *,
    submodules: type[PipelinedSubmodules],
    encoder_class: type[PatchEncoder],
    encoder_name: str,
    patches: Patches,
    encoder: TransformerConfig,
    projector: TransformerConfig,
    pg_collection: ProcessGroupCollection | None,
    attention: AttentionKind = "sdpa",
) -> ModuleSpec:
    """ModuleSpec of a modality: a :class:`PatchEncoder` and a two-layer projector.

    Args:
        submodules: class of the modality.
        encoder_class: class of the encoder.
        encoder_name: key of the encoder in ``modality_inputs``.
        patches: division of an item into patches and tokens.
        encoder: config of the encoder's transformer.
        projector: config of the projector. Its ``hidden_size`` is that of the language module, its ``ffn_hidden_size``
            the width between its two layers.
        pg_collection: the module's process groups on this rank; ``None`` if the module is not on this rank.
        attention: attention implementation of the encoder, a value of ``TransformerSize.attention``.
    """
    return ModuleSpec(
        module=submodules,
        params={"pg_collection": pg_collection},
        submodules={
            "encoders": {
                encoder_name: ModuleSpec(
                    module=encoder_class,
                    params={
                        "transformer_config": encoder,
                        "patches": patches,
                        "pg_collection": pg_collection,
                        "attention": attention,
                    },
                )
            },
            "input_projections": [
                ModuleSpec(
                    module=MultimodalProjector,
                    params={
                        "config": projector,
                        "submodules": MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
                        "projector_type": "mlp",
                        "input_size": patches.patches_per_token * encoder.hidden_size,
                        "pg_collection": pg_collection,
                    },
                )
            ],
        },
    )

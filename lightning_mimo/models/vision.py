"""A vision transformer whose patches are merged into language tokens, and its ModuleSpec for MimoModel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class ImageGrid:
    """How an image becomes tokens.

    Args:
        image_size: height and width in pixels.
        patch_size: height and width of one patch in pixels; divides ``image_size``.
        channels: colour channels.
        tokens_per_image: language tokens that one image becomes; consecutive patches are concatenated to get there,
            so it divides the number of patches.
    """

    image_size: int
    patch_size: int
    channels: int = 3
    tokens_per_image: int = 1

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}: "
                f"{self.image_size} / {self.patch_size} = {self.image_size / self.patch_size:g}."
            )
        if self.patches % self.tokens_per_image:
            raise ValueError(
                f"tokens_per_image={self.tokens_per_image} does not divide the {self.patches} patches of an image "
                f"(({self.image_size} / {self.patch_size})^2)."
            )

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def pixels_per_patch(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def patches_per_token(self) -> int:
        return self.patches // self.tokens_per_image


class VisionEncoder(MegatronModule):
    """Patches -> linear embedding + learned positions -> transformer -> ``patches_per_token`` patches side by side.

    Runs as one pipeline stage of several where ``pg_collection.pp`` has more than one rank.
    """

    def __init__(
        self, transformer_config: TransformerConfig, grid: ImageGrid, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config=transformer_config)
        self.grid = grid
        self._first = pg_collection.pp.rank() == 0
        self._last = pg_collection.pp.rank() == pg_collection.pp.size() - 1
        if self._first:
            dtype, device = transformer_config.params_dtype, torch.cuda.current_device()
            self.patch_embedding = torch.nn.Linear(
                grid.pixels_per_patch, transformer_config.hidden_size, dtype=dtype, device=device
            )
            self.positions = torch.nn.Parameter(
                torch.empty(grid.patches, transformer_config.hidden_size, dtype=dtype, device=device)
            )
            torch.nn.init.normal_(self.positions, std=transformer_config.embedding_init_method_std)
        self.decoder = TransformerBlock(
            config=transformer_config,
            spec=get_vit_layer_with_local_spec(),
            pre_process=self._first,
            post_process=self._last,
            pg_collection=pg_collection,
        )

    def forward(
        self, pixel_values: torch.Tensor | None = None, hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode images, or continue from the stage before.

        Args:
            pixel_values: ``[n, channels, image_size, image_size]``, on the first stage; n may be 0.
            hidden_states: ``[patches, n, hidden]`` from the stage before, on later stages.

        Returns:
            ``[n, tokens_per_image, patches_per_token * hidden]`` on the last stage, ``[patches, n, hidden]`` before.
        """
        if self._first:
            hidden_states = self.patch_embedding(self._patches(pixel_values)) + self.positions
            hidden_states = hidden_states.transpose(0, 1).contiguous()
        else:
            self.decoder.set_input_tensor(hidden_states)
            hidden_states = None
        hidden_states = self.decoder(hidden_states, attention_mask=None)
        if not self._last:
            return hidden_states
        # Back to [n, patches, hidden] before anything is flattened: otherwise samples get each other's features.
        return hidden_states.transpose(0, 1).reshape(hidden_states.size(1), self.grid.tokens_per_image, -1)

    def _patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``[n, c, h, w] -> [n, patches, c * patch * patch]``, patches row by row."""
        n, channels, height, width = pixel_values.shape
        size = self.grid.patch_size
        cut = pixel_values.reshape(n, channels, height // size, size, width // size, size)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, self.grid.patches, self.grid.pixels_per_patch)


class PipelinedVisionSubmodules(VisionModalitySubmodules):
    """Vision modality whose encoder may span pipeline stages: upstream's skips the encoder on later stages."""

    def forward(
        self, encoder_inputs: dict[str, Any] | None = None, hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """As upstream's; on stages after the first, ``hidden_states`` goes through this stage's part of the encoder."""
        if self.is_first_stage and self.is_last_stage:
            return super().forward(encoder_inputs=encoder_inputs, hidden_states=hidden_states)
        (name, encoder), *others = self.encoders.items()
        assert not others, "a pipelined modality has one encoder"
        if self.is_first_stage:
            return None if encoder_inputs is None else encoder(**encoder_inputs[name])
        if hidden_states.ndim == 2:
            return hidden_states  # MimoModel's empty output: no image at all on the stages before
        output = encoder(hidden_states=hidden_states)
        if not self.is_last_stage:
            return output
        return self.project_embeddings([output.reshape(-1, output.size(-1))], is_input=True)


def vision_spec(
    *,
    grid: ImageGrid,
    encoder: TransformerConfig,
    projector: TransformerConfig,
    pg_collection: ProcessGroupCollection | None,
    encoder_name: str = "vit",
) -> ModuleSpec:
    """ModuleSpec of a vision modality: a :class:`VisionEncoder` and a two-layer projector.

    Args:
        grid: how an image becomes tokens.
        encoder: config of the encoder's transformer.
        projector: config of the projector; its ``hidden_size`` is the language module's, its ``ffn_hidden_size`` the
            width of the layer between.
        pg_collection: the module's process groups on this rank; ``None`` where this rank does not hold it.
        encoder_name: key of the encoder in ``modality_inputs``.
    """
    return ModuleSpec(
        module=PipelinedVisionSubmodules,
        params={"pg_collection": pg_collection},
        submodules={
            "encoders": {
                encoder_name: ModuleSpec(
                    module=VisionEncoder,
                    params={"transformer_config": encoder, "grid": grid, "pg_collection": pg_collection},
                )
            },
            "input_projections": [
                ModuleSpec(
                    module=MultimodalProjector,
                    params={
                        "config": projector,
                        "submodules": MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
                        "projector_type": "mlp",
                        "input_size": grid.patches_per_token * encoder.hidden_size,
                        "pg_collection": pg_collection,
                    },
                )
            ],
        },
    )

"""A vision transformer whose patches are merged into language tokens, and its ModuleSpec for MimoModel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo.errors import ConfigError
from lightning_mimo.layers.attention import AttentionKind
from lightning_mimo.models.patches import PatchEncoder, PipelinedSubmodules, modality_spec


@dataclass(frozen=True, kw_only=True)
class ImagePatches:
    """Division of an image into patches and language tokens.

    Example: ``image_size=8, patch_size=2, tokens_per_image=4`` gives 16 patches, of which 4 are concatenated per token.

    Args:
        image_size: height and width in pixels.
        patch_size: height and width of one patch in pixels; must divide ``image_size``.
        channels: number of color channels.
        tokens_per_image: language tokens of one image. Consecutive patches are concatenated, so it must divide the
            number of patches.
    """

    image_size: int
    patch_size: int
    channels: int = 3
    tokens_per_image: int = 1

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}: "
                f"{self.image_size} / {self.patch_size} = {self.image_size / self.patch_size:g}."
            )
        if self.num_patches % self.tokens_per_image:
            raise ConfigError(
                f"tokens_per_image={self.tokens_per_image} does not divide the {self.num_patches} patches of an image "
                f"(({self.image_size} / {self.patch_size})^2)."
            )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def values_per_patch(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def tokens_per_item(self) -> int:
        return self.tokens_per_image

    @property
    def patches_per_token(self) -> int:
        return self.num_patches // self.tokens_per_image

    def blank(self, images: int) -> torch.Tensor:
        """Black images, float32 ``[images, channels, image_size, image_size]``."""
        return torch.zeros(images, self.channels, self.image_size, self.image_size)


class VisionEncoder(PatchEncoder):
    """A :class:`PatchEncoder` of square patches of pixels."""

    patches: ImagePatches

    def example_inputs(self, items: int) -> tuple[dict[str, torch.Tensor], int]:
        """Black images as :meth:`forward` takes them, and the embeddings of each, for estimates without data."""
        return {"pixel_values": self.patches.blank(items)}, self.patches.tokens_per_item

    def forward(
        self, pixel_values: torch.Tensor | None = None, hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode images, or continue from the previous stage.

        Args:
            pixel_values: ``[n, channels, image_size, image_size]``, on the first stage; n may be 0.
            hidden_states: ``[patches, n, hidden]`` from the previous stage, on later stages.

        Returns:
            ``[n, tokens_per_image, patches_per_token * hidden]`` on the last stage, otherwise ``[patches, n, hidden]``.
        """
        return self.encode(None if pixel_values is None else to_patches(pixel_values, self.patches), hidden_states)


def to_patches(pixel_values: torch.Tensor, patches: ImagePatches) -> torch.Tensor:
    """``[n, channels, height, width] -> [n, patches, channels * patch * patch]``, patches row by row."""
    n, channels, height, width = pixel_values.shape
    size = patches.patch_size
    cut = pixel_values.reshape(n, channels, height // size, size, width // size, size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, patches.num_patches, patches.values_per_patch)


class PipelinedVisionSubmodules(PipelinedSubmodules, VisionModalitySubmodules):
    """Vision modality whose encoder may span pipeline stages."""


def vision_spec(
    *,
    patches: ImagePatches,
    encoder: TransformerConfig,
    projector: TransformerConfig,
    pg_collection: ProcessGroupCollection | None,
    encoder_name: str = "vit",
    attention: AttentionKind = "sdpa",
) -> ModuleSpec:
    """ModuleSpec of a vision modality; same arguments as :func:`lightning_mimo.models.patches.modality_spec`."""
    return modality_spec(
        submodules=PipelinedVisionSubmodules,
        encoder_class=VisionEncoder,
        encoder_name=encoder_name,
        patches=patches,
        encoder=encoder,
        projector=projector,
        pg_collection=pg_collection,
        attention=attention,
    )

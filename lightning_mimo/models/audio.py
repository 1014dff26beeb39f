"""An audio transformer whose patches are merged into language tokens, and its ModuleSpec for MimoModel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.models.mimo.submodules.audio import AudioModalitySubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo.errors import ConfigError
from lightning_mimo.layers.attention import AttentionKind
from lightning_mimo.models.patches import PatchEncoder, PipelinedSubmodules, modality_spec


@dataclass(frozen=True, kw_only=True)
class ClipPatches:
    """Division of an audio clip into patches and language tokens.

    Example: ``frames=8, frames_per_patch=2, tokens_per_clip=2`` gives 4 patches, of which 2 are concatenated per token.

    Args:
        frames: frames of a clip's spectrogram; shorter clips must be padded with silence.
        bins: values per frame, such as mel bands.
        frames_per_patch: consecutive frames of one patch; must divide ``frames``.
        tokens_per_clip: language tokens of one clip. Consecutive patches are concatenated, so it must divide the number
            of patches.
    """

    frames: int
    bins: int
    frames_per_patch: int = 1
    tokens_per_clip: int = 1

    def __post_init__(self) -> None:
        if self.frames % self.frames_per_patch:
            raise ConfigError(
                f"frames={self.frames} is not a multiple of frames_per_patch={self.frames_per_patch}: "
                f"{self.frames} / {self.frames_per_patch} = {self.frames / self.frames_per_patch:g}."
            )
        if self.num_patches % self.tokens_per_clip:
            raise ConfigError(
                f"tokens_per_clip={self.tokens_per_clip} does not divide the {self.num_patches} patches of a clip "
                f"({self.frames} / {self.frames_per_patch})."
            )

    @property
    def num_patches(self) -> int:
        return self.frames // self.frames_per_patch

    @property
    def values_per_patch(self) -> int:
        return self.frames_per_patch * self.bins

    @property
    def tokens_per_item(self) -> int:
        return self.tokens_per_clip

    @property
    def patches_per_token(self) -> int:
        return self.num_patches // self.tokens_per_clip


class AudioEncoder(PatchEncoder):
    """A :class:`PatchEncoder` of consecutive frames."""

    patches: ClipPatches

    def example_inputs(self, items: int) -> tuple[dict[str, torch.Tensor], int]:
        """Silent clips as :meth:`forward` takes them, and the embeddings of each, for estimates without data."""
        features = torch.zeros(items, self.patches.frames, self.patches.bins)
        return {"features": features}, self.patches.tokens_per_item

    def forward(self, features: torch.Tensor | None = None, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """Encode clips, or continue from the previous stage.

        Args:
            features: ``[n, frames, bins]``, such as log-mel energies, on the first stage; n may be 0.
            hidden_states: ``[patches, n, hidden]`` from the previous stage, on later stages.

        Returns:
            ``[n, tokens_per_clip, patches_per_token * hidden]`` on the last stage, otherwise ``[patches, n, hidden]``.
        """
        if features is not None:
            features = features.reshape(len(features), self.patches.num_patches, self.patches.values_per_patch)
        return self.encode(features, hidden_states)


class PipelinedAudioSubmodules(PipelinedSubmodules, AudioModalitySubmodules):
    """Audio modality whose encoder may span pipeline stages."""


def audio_spec(
    *,
    patches: ClipPatches,
    encoder: TransformerConfig,
    projector: TransformerConfig,
    pg_collection: ProcessGroupCollection | None,
    encoder_name: str = "clips",
    attention: AttentionKind = "sdpa",
) -> ModuleSpec:
    """ModuleSpec of an audio modality; same arguments as :func:`lightning_mimo.models.patches.modality_spec`."""
    return modality_spec(
        submodules=PipelinedAudioSubmodules,
        encoder_class=AudioEncoder,
        encoder_name=encoder_name,
        patches=patches,
        encoder=encoder,
        projector=projector,
        pg_collection=pg_collection,
        attention=attention,
    )

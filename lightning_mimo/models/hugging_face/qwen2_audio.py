"""Qwen2-Audio: Whisper's encoder over clips of one length, of which the embeddings of silence are left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.spec_utils import ModuleSpec

from lightning_mimo.data.items import Inputs, ItemSizes
from lightning_mimo.errors import DataError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.models.audio import PipelinedAudioSubmodules
from lightning_mimo.models.hugging_face.config_values import refuse
from lightning_mimo.models.hugging_face.decoder import BuildOptions
from lightning_mimo.models.hugging_face.prefixes import first_used
from lightning_mimo.models.hugging_face.towers import check_undivided, names_in_files
from lightning_mimo.models.hugging_face.with_encoder import LINEAR, PROJECTOR, ModelWithEncoder
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.weights.rules import Rename, RuleTable, Source

FEATURES, MASK = "input_features", "feature_attention_mask"
_TOWER = ("audio_tower.", "model.audio_tower.")
_CONV_STRIDE = 2
_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop")


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Clips of audio, filled up with silence to one length.

    Attributes:
        bins: mel bands.
        positions: of the encoder's transformer, each of two frames.
    """

    bins: int
    positions: int

    @property
    def frames(self) -> int:
        """Of a clip, silence included."""
        return self.positions * _CONV_STRIDE

    @property
    def item_sizes(self) -> ItemSizes:
        """What a sample must have."""
        return ItemSizes(embeddings=self._embeddings_of_inputs)

    @staticmethod
    def positions_of(frames: torch.Tensor) -> torch.Tensor:
        """Positions that numbers of frames without silence come to."""
        return (frames - 1) // _CONV_STRIDE + 1

    @staticmethod
    def embeddings_of(positions: torch.Tensor) -> torch.Tensor:
        """Embeddings of numbers of positions, of which two by two are averaged."""
        return (positions - 2) // 2 + 1

    def _embeddings_of_inputs(self, inputs: Inputs) -> torch.Tensor:
        features, mask = inputs[FEATURES], inputs[MASK]
        assert isinstance(features, torch.Tensor)
        assert isinstance(mask, torch.Tensor)
        if features.shape[1:] != (self.bins, self.frames) or mask.shape != (len(features), self.frames):
            raise DataError(
                f"{FEATURES} has the shape {list(features.shape)} and {MASK} {list(mask.shape)}, but this encoder "
                f"takes [n, {self.bins}, {self.frames}] and [n, {self.frames}]. Use the feature extractor of the "
                f"model's folder with padding='max_length'."
            )
        frames = (mask != 0).sum(dim=-1)
        if not torch.equal(mask != 0, torch.arange(self.frames) < frames[:, None]):
            raise DataError(
                f"{MASK} is not ones and then zeros, but silence can only be left out at the end of a clip."
            )
        return self.embeddings_of(self.positions_of(frames))


class ClipEncoder(torch.nn.Module):
    """The audio encoder of transformers: every rank of its module holds all of it. Its positions are not trained."""

    def __init__(self, config: Any, clips: Clips) -> None:
        """
        Args:
            config: a Qwen2AudioEncoderConfig of transformers.
            clips: what it takes.
        """
        super().__init__()
        from transformers import AutoModel  # an extra; only what is in the package itself is ever built

        self.tower = AutoModel.from_config(config)
        self.clips = clips
        self.item_sizes = clips.item_sizes

    def forward(self, input_features: torch.Tensor, feature_attention_mask: torch.Tensor) -> torch.Tensor:
        """Encode clips.

        Args:
            input_features: ``[n, bins, frames]``, log-mel energies.
            feature_attention_mask: ``[n, frames]``, 0 in the silence at the end.

        Returns:
            ``[embeddings, width]`` of all clips.
        """
        positions = self.clips.positions_of((feature_attention_mask != 0).sum(dim=-1))
        is_silent = torch.arange(self.clips.positions, device=positions.device) >= positions[:, None]
        dtype = self.tower.conv1.weight.dtype
        # Added to the scores, in which form eager attention and torch's both take it.
        mask = torch.zeros(is_silent.shape, dtype=dtype, device=is_silent.device)
        mask = mask.masked_fill(is_silent, torch.finfo(dtype).min)[:, None, None, :]
        mask = mask.expand(-1, -1, self.clips.positions, -1)
        features = self.tower(input_features.to(dtype), attention_mask=mask).last_hidden_state
        kept = torch.arange(features.size(1), device=positions.device) < self.clips.embeddings_of(positions)[:, None]
        return features[kept]


class Qwen2AudioModel(ModelWithEncoder):
    """Modules ``audio`` and ``language``."""

    module = "audio"
    encoder = "encoder"
    submodules = PipelinedAudioSubmodules

    def __init__(self, config: Any, model_of: Callable[[Any], Any]) -> None:
        """
        Args:
            config: a Qwen2AudioConfig of transformers.
            model_of: the model of a config, for its text.

        Raises:
            ConfigError: for what this package's model cannot follow.
        """
        super().__init__(config, model_of, placeholder=("audio_token_index", "audio_token_id"))
        audio = config.audio_config
        if self.text.tied:
            raise refuse(config, "tie_word_embeddings=True", "transformers does not tie them for this kind of model.")
        for name in _DROPOUTS:
            if value := getattr(audio, name):
                raise refuse(audio, f"{name}={value}", "Set it to 0.0 in config.json.")
        self.clips = Clips(bins=audio.num_mel_bins, positions=audio.max_source_positions)

    def check_encoder(self, layout: MimoLayout) -> None:
        check_undivided(layout, self.module, self.config.audio_config.model_type)

    def encoder_spec(self, infra: MimoModelInfra, options: BuildOptions) -> ModuleSpec:
        return ModuleSpec(module=ClipEncoder, params={"config": self.config.audio_config, "clips": self.clips})

    def projector_spec(self, infra: MimoModelInfra) -> ModuleSpec:
        return ModuleSpec(
            module=MultimodalProjector,
            params={
                "config": self.projector_config(infra, bias=True),
                "submodules": LINEAR,
                "projector_type": "affine",
                "input_size": self.config.audio_config.d_model,
                "pg_collection": infra.pg_collections.get(self.module),
            },
        )

    def rules(self, shapes: Mapping[str, Sequence[int]], padded_vocab_size: int) -> RuleTable:
        rules, kept = self.language_rules(shapes, padded_vocab_size)
        tower, projector = first_used(_TOWER, shapes), first_used(PROJECTOR, shapes)
        rules += [
            Rename(f"{self.encoder_prefix}tower.{name}", Source(name=f"{tower}{in_files}", shape=tuple(shape)))
            for in_files, (name, shape) in names_in_files(self.config.audio_config).items()
        ]
        hidden = self.text.size.hidden_size
        for kind, columns in (("weight", (self.config.audio_config.d_model,)), ("bias", ())):
            source = Source(name=f"{projector}linear.{kind}", shape=(hidden, *columns))
            rules.append(Rename(f"{self.projector_prefix}encoder.{kind}", source))
        return RuleTable(rules, kept=kept)

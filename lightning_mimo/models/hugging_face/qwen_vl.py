"""Qwen2-VL and Qwen2.5-VL: images of any size, positions in time, height and width, and the decoder of Qwen2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.models.hugging_face.config_values import is_tied, mrope_section_of, refuse
from lightning_mimo.models.hugging_face.decoder import BuildOptions, TextModel
from lightning_mimo.models.hugging_face.grid_positions import GridPositions
from lightning_mimo.models.hugging_face.prefixes import first_used
from lightning_mimo.models.hugging_face.qwen import qwen2_size
from lightning_mimo.models.hugging_face.qwen_vision import GridMerger, GridTower, VisionClasses
from lightning_mimo.models.hugging_face.towers import check_undivided
from lightning_mimo.models.hugging_face.with_encoder import IMAGES, VISION
from lightning_mimo.models.vision import PipelinedVisionSubmodules
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.weights.rules import Rename, Rule, RuleTable, Source

QWEN2_VISION = VisionClasses(
    path="transformers.models.qwen2_vl.modeling_qwen2_vl",
    tower="Qwen2VisionTransformerPretrainedModel",
    merger="PatchMerger",
    width="embed_dim",
    output_width="hidden_size",
)
QWEN2_5_VISION = VisionClasses(
    path="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    tower="Qwen2_5_VisionTransformerPretrainedModel",
    merger="Qwen2_5_VLPatchMerger",
    width="hidden_size",
    output_width="out_hidden_size",
)

# As published, and as the parameters are called in transformers' models.
_TEXT = ("model.language_model.", "model.")
_TOWER = ("visual.", "model.visual.")


class QwenVLModel:
    """Modules ``images`` and ``language``. The projector ``images.input_projections`` is the merger."""

    modules = (IMAGES, LANGUAGE)

    def __init__(self, config: Any, classes: VisionClasses) -> None:
        """
        Args:
            config: a Qwen2VLConfig or Qwen2_5_VLConfig of transformers.
            classes: of its vision encoder.

        Raises:
            ConfigError: for what this package's model cannot follow.
        """
        text, vision = config.text_config, config.vision_config
        size = qwen2_size(text, mrope_section=mrope_section_of(text))
        if size.rope_scaling is not None:
            raise refuse(text, "rope_type='llama3'", "Supported with positions of three dimensions: 'default'.")
        if size.head * size.num_attention_heads != size.hidden_size:
            raise refuse(text, f"head_dim={size.head}", "Supported: hidden_size / num_attention_heads.")
        _check_vision(vision)
        if (width := getattr(vision, classes.output_width)) != size.hidden_size:
            raise ConfigError(
                f"config.json: the vision encoder makes embeddings of the width {width} ({classes.output_width} in "
                f"vision_config), but hidden_size of the text is {size.hidden_size}. They must be the same."
            )
        self.config = config
        self.text = TextModel(text, size)
        self.text.tied = is_tied(config)
        self._classes = classes

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    def padded_vocab_size(self, tp: int) -> int:
        return self.text.padded_vocab_size(tp)

    def max_sequence_length(self, options: BuildOptions) -> int:
        return self.text.max_sequence_length(options)

    def check(self, layout: MimoLayout, options: BuildOptions) -> None:
        self.text.check(layout, options)
        check_undivided(layout, IMAGES, self.config.vision_config.model_type)
        if self.config.image_token_id >= self.vocab_size:
            raise ConfigError(
                f"config.json has image_token_id={self.config.image_token_id}, but vocab_size={self.vocab_size}: the "
                f"placeholder must be one of the token ids 0 to {self.vocab_size - 1}."
            )

    def mimo_config(self, infra: MimoModelInfra, options: BuildOptions) -> MimoModelConfig:
        params = {"config": self.config.vision_config, "classes": self._classes}
        images = ModuleSpec(
            module=PipelinedVisionSubmodules,
            params={"pg_collection": infra.pg_collections.get(IMAGES)},
            submodules={
                "encoders": {VISION: ModuleSpec(module=GridTower, params=params)},
                "input_projections": [ModuleSpec(module=GridMerger, params=params)],
            },
        )
        return MimoModelConfig(
            self.text.language_spec(infra, options), {IMAGES: images}, {IMAGES: self.config.image_token_id}
        )

    def complete_format(self, expected: SampleFormat) -> SampleFormat:
        """Positions where a sample has none, and no videos, which would need another placeholder."""
        image, video = self.config.image_token_id, self.config.video_token_id
        positions = GridPositions(
            module=IMAGES,
            encoder=VISION,
            argument="image_grid_thw",
            token=image,
            merge_size=self.config.vision_config.spatial_merge_size,
        )
        meaning = (
            f"which stands for a video, and there is no input for videos. Give a video as an image: {image} in place "
            f"of {video}, pixel_values_videos and video_grid_thw as pixel_values and image_grid_thw, and position_ids "
            f"[3, S] as the model's get_rope_index computes them for the video."
        )
        return replace(expected, positions=positions, refused_token_ids={video: meaning})

    def rules(self, shapes: Mapping[str, Sequence[int]], padded_vocab_size: int) -> RuleTable:
        rules, kept = self.text.language_rules(padded_vocab_size, prefix=first_used(_TEXT, shapes))
        return RuleTable([*rules, *self._vision_rules(first_used(_TOWER, shapes))], kept=kept)

    def _vision_rules(self, prefix: str) -> list[Rule]:
        with torch.device("meta"):
            whole = self._classes.build_tower(self.config.vision_config)
        targets = {"merger.": f"{IMAGES}.input_projections.0.merger.", "": f"{IMAGES}.encoders.{VISION}.tower."}
        rules = []
        for name, parameter in whole.named_parameters():
            inner = next(inner for inner in targets if name.startswith(inner))
            source = Source(name=f"{prefix}{name}", shape=tuple(parameter.shape))
            rules.append(Rename(f"{targets[inner]}{name.removeprefix(inner)}", source))
        return rules


def _check_vision(config: Any) -> None:
    """Refuse what transformers' encoder would ignore, or fail at when it runs."""
    if indices := getattr(config, "deepstack_visual_indexes", None):
        raise refuse(config, f"deepstack_visual_indexes={indices}", "Supported: features of the last layer.")
    full = getattr(config, "fullatt_block_indexes", ())
    if outside := [index for index in full if not 0 <= index < config.depth]:
        raise refuse(
            config,
            f"fullatt_block_indexes={list(full)} with depth={config.depth}",
            f"There is no layer {outside[0]}: layers are 0 to {config.depth - 1}.",
        )
    merged = config.spatial_merge_size * config.patch_size
    window = getattr(config, "window_size", None)
    if window is not None and (window < merged or window % merged):
        raise refuse(
            config,
            f"window_size={window}",
            f"A window is a multiple of spatial_merge_size * patch_size = {merged} pixels.",
        )

"""LLaVA 1.5: a vision encoder, a two-layer projector and a decoder; one placeholder for each feature of an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron.core.models.mimo import MimoModelConfig
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.models.hugging_face.config_values import activation_of, is_tied, refuse
from lightning_mimo.models.hugging_face.decoder import BuildOptions, TextModel
from lightning_mimo.models.hugging_face.prefixes import first_used, is_used
from lightning_mimo.models.hugging_face.towers import tower_of
from lightning_mimo.models.sizes import TransformerSize, check_divides, transformer_config
from lightning_mimo.models.vision import PipelinedVisionSubmodules
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.weights.rules import Rename, Rule, RuleTable, Source

IMAGES = "images"
ENCODER = "vision"
"""Key of the encoder in ``modality_inputs``: ``{"images": {"vision": {"pixel_values": [n, 3, size, size]}}}``."""

PROJECTION = f"{IMAGES}.input_projections.0."
"""Prefix of the projector's parameters."""

# transformers has changed its names; files of all versions are around, and an export has those of its source.
_TEXT = (("language_model.model.", "language_model.lm_head.weight"), ("model.language_model.", "lm_head.weight"))
_TOWER = ("vision_tower.vision_model.", "model.vision_tower.vision_model.", "vision_tower.", "model.vision_tower.")
MULTI_MODAL_PROJECTOR = "multi_modal_projector."
_PROJECTOR = (MULTI_MODAL_PROJECTOR, f"model.{MULTI_MODAL_PROJECTOR}")


class LlavaModel:
    """Modules ``images`` and ``language``."""

    modules = (IMAGES, LANGUAGE)
    tower_path = ""
    """Where the tower is in the encoder."""
    projector_path = ""
    """Where its two layers are in the projector."""

    def __init__(self, config: Any, model_of: Callable[[Any], Any]) -> None:
        """
        Args:
            config: a LlavaConfig of transformers.
            model_of: the model of a config, for its text.

        Raises:
            ConfigError: for what this package's model cannot follow.
        """
        text = model_of(config.text_config)
        if not isinstance(text, TextModel):
            raise refuse(config, f"text_config.model_type={config.text_config.model_type!r}", "Supported: decoders.")
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        if not isinstance(layer, int):
            raise refuse(config, f"vision_feature_layer={layer}", "Supported: one layer.")
        self.config = config
        self.text = text
        self.text.tied = is_tied(config)
        layers = config.vision_config.num_hidden_layers
        self.tower = tower_of(
            config.vision_config,
            layer=layer if layer >= 0 else layers + 1 + layer,
            drop_first=strategy == "default",
        )
        self._activation = activation_of(config, "projector_hidden_act")

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def image_token_id(self) -> int:
        """The placeholder."""
        return self.config.image_token_id if hasattr(self.config, "image_token_id") else self.config.image_token_index

    def padded_vocab_size(self, tp: int) -> int:
        return self.text.padded_vocab_size(tp)

    def max_sequence_length(self, options: BuildOptions) -> int:
        return self.text.max_sequence_length(options)

    def check(self, layout: MimoLayout, options: BuildOptions) -> None:
        self.text.check(layout, options)
        self.tower.check(layout, IMAGES)
        tp = layout.modules[IMAGES].tp
        check_divides("hidden_size of the language module", self.text.size.hidden_size, IMAGES, "tp", tp)
        if self.image_token_id >= self.vocab_size:
            raise ConfigError(
                f"config.json has image_token_index={self.image_token_id}, but vocab_size={self.vocab_size}: the "
                f"placeholder must be one of the token ids 0 to {self.vocab_size - 1}."
            )

    def mimo_config(self, infra: MimoModelInfra, options: BuildOptions) -> MimoModelConfig:
        groups = infra.pg_collections.get(IMAGES)
        images = ModuleSpec(
            module=PipelinedVisionSubmodules,
            params={"pg_collection": groups},
            submodules={
                "encoders": {ENCODER: self.encoder_spec(infra, options)},
                "input_projections": [self.projector_spec(infra)],
            },
        )
        return MimoModelConfig(self.text.language_spec(infra, options), {IMAGES: images}, {IMAGES: self.image_token_id})

    def encoder_spec(self, infra: MimoModelInfra, options: BuildOptions) -> ModuleSpec:
        """ModuleSpec of the vision encoder."""
        return self.tower.encoder_spec(infra, IMAGES, options)

    def projector_spec(self, infra: MimoModelInfra) -> ModuleSpec:
        """ModuleSpec of the projector of features, ``[rows, width] -> [rows, hidden]``."""
        sizes = infra.layout.modules[IMAGES]
        size = TransformerSize(
            num_layers=sizes.pp,  # it has none of these, nor heads
            num_attention_heads=sizes.tp,
            hidden_size=self.text.size.hidden_size,
            ffn_hidden_size=self.text.size.hidden_size,
            activation=self._activation,
        )
        config = transformer_config(infra.layout, IMAGES, size)
        config.add_bias_linear = self.config.multimodal_projector_bias
        return ModuleSpec(
            module=MultimodalProjector,
            params={
                "config": config,
                "submodules": MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
                "projector_type": "mlp",
                "input_size": self.tower.width,
                "pg_collection": infra.pg_collections.get(IMAGES),
            },
        )

    def complete_format(self, expected: SampleFormat) -> SampleFormat:
        return expected

    def rules(self, shapes: Mapping[str, Sequence[int]], padded_vocab_size: int) -> RuleTable:
        prefix, head = next((each for each in _TEXT if is_used(each[0], shapes)), _TEXT[0])
        rules, kept = self.text.language_rules(padded_vocab_size, prefix=prefix, head=head)
        tower = first_used(_TOWER, shapes)
        rules += self.tower.rules(f"{IMAGES}.encoders.{ENCODER}.{self.tower_path}", tower, shapes)
        rules += self.projector_rules(first_used(_PROJECTOR, shapes))
        return RuleTable(rules, kept=[*kept, *self.tower.kept(tower)])

    def projector_rules(self, prefix: str) -> list[Rule]:
        """Rules of what is under ``images.input_projections``, given the prefix of its linear layers in the files."""
        hidden, target = self.text.size.hidden_size, f"{PROJECTION}{self.projector_path}encoder."
        shapes = {
            "weight": (self.tower.width, hidden),
            **({"bias": ()} if self.config.multimodal_projector_bias else {}),
        }
        rules = []
        for kind, widths in shapes.items():
            for number in range(2):
                shape = (hidden, *widths[number : number + 1])
                source = Source(name=f"{prefix}linear_{number + 1}.{kind}", shape=shape)
                rules.append(Rename(f"{target}linear_fc{number + 1}.{kind}", source))
        return rules

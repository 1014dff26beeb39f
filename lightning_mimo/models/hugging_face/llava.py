"""LLaVA 1.5: a vision encoder, a two-layer projector and a decoder; one placeholder for each feature of an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.spec_utils import ModuleSpec

from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.models.hugging_face.config_values import activation_of, refuse
from lightning_mimo.models.hugging_face.decoder import BuildOptions
from lightning_mimo.models.hugging_face.prefixes import first_used
from lightning_mimo.models.hugging_face.towers import tower_of
from lightning_mimo.models.hugging_face.with_encoder import LINEAR, PROJECTOR, ModelWithEncoder
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.weights.rules import Rename, Rule, RuleTable, Source

_TOWER = ("vision_tower.vision_model.", "model.vision_tower.vision_model.", "vision_tower.", "model.vision_tower.")


class LlavaModel(ModelWithEncoder):
    """Modules ``images`` and ``language``; ``{"images": {"vision": {"pixel_values": [n, 3, size, size]}}}``."""

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
        super().__init__(config, model_of, placeholder=("image_token_index", "image_token_id"))
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        if not isinstance(layer, int):
            raise refuse(config, f"vision_feature_layer={layer}", "Supported: one layer.")
        layers = config.vision_config.num_hidden_layers
        self.tower = tower_of(
            config.vision_config,
            layer=layer if layer >= 0 else layers + 1 + layer,
            drop_first=strategy == "default",
        )
        self._activation = activation_of(config, "projector_hidden_act")

    def check_encoder(self, layout: MimoLayout) -> None:
        self.tower.check(layout, self.module)

    def encoder_spec(self, infra: MimoModelInfra, options: BuildOptions) -> ModuleSpec:
        return self.tower.encoder_spec(infra, self.module, options)

    def projector_spec(self, infra: MimoModelInfra) -> ModuleSpec:
        bias = self.config.multimodal_projector_bias
        return ModuleSpec(
            module=MultimodalProjector,
            params={
                "config": self.projector_config(infra, bias=bias, activation=self._activation),
                "submodules": LINEAR,
                "projector_type": "mlp",
                "input_size": self.tower.width,
                "pg_collection": infra.pg_collections.get(self.module),
            },
        )

    def rules(self, shapes: Mapping[str, Sequence[int]], padded_vocab_size: int) -> RuleTable:
        rules, kept = self.language_rules(shapes, padded_vocab_size)
        tower = first_used(_TOWER, shapes)
        rules += self.tower.rules(f"{self.encoder_prefix}{self.tower_path}", tower, shapes)
        rules += self.projector_rules(first_used(PROJECTOR, shapes))
        return RuleTable(rules, kept=[*kept, *self.tower.kept(tower)])

    def projector_rules(self, prefix: str) -> list[Rule]:
        """Rules of what is under ``images.input_projections``, given the prefix of its linear layers in the files."""
        hidden, target = self.text.size.hidden_size, f"{self.projector_prefix}{self.projector_path}encoder."
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

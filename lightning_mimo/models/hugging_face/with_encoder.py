"""What families of one encoder, a projector and a decoder of the Llama kind share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron.core.models.mimo import MimoModelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.models.hugging_face.config_values import is_tied, refuse
from lightning_mimo.models.hugging_face.decoder import BuildOptions, TextModel
from lightning_mimo.models.hugging_face.prefixes import is_used
from lightning_mimo.models.patches import PipelinedSubmodules
from lightning_mimo.models.sizes import Activation, TransformerSize, check_divides, transformer_config
from lightning_mimo.models.vision import PipelinedVisionSubmodules
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.weights.rules import Rule, RuleTable

IMAGES = "images"
VISION = "vision"
"""Key of an image encoder in ``modality_inputs``: ``{"images": {"vision": {"pixel_values": ...}}}``."""

# transformers has changed its names; files of all versions are around, and an export has those of its source.
MULTI_MODAL_PROJECTOR = "multi_modal_projector."
PROJECTOR = (MULTI_MODAL_PROJECTOR, f"model.{MULTI_MODAL_PROJECTOR}")
_TEXT = (("language_model.model.", "language_model.lm_head.weight"), ("model.language_model.", "lm_head.weight"))

LINEAR = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
"""Layers of a projector."""


class ModelWithEncoder(ABC):
    """A decoder with one encoder. Subclasses add the encoder, the projector, and the rules of all weights.

    Attributes:
        module: name of the encoder's module.
        encoder: key of the encoder in ``modality_inputs``.
        submodules: class of the encoder's module.
        text_names: prefix of the decoder and name of its head in the files, the first that there is counts.
    """

    module = IMAGES
    encoder = VISION
    text_names: Sequence[tuple[str, str]] = _TEXT
    submodules: type[PipelinedSubmodules] = PipelinedVisionSubmodules

    def __init__(self, config: Any, model_of: Callable[[Any], Any], *, placeholder: Sequence[str]) -> None:
        """
        Args:
            config: of transformers, with a ``text_config``.
            model_of: the model of a config, for its text.
            placeholder: names of the field of the config that holds the placeholder, the first that there is counts.

        Raises:
            ConfigError: for what this package's model cannot follow.
        """
        text = model_of(config.text_config)
        if not isinstance(text, TextModel):
            raise refuse(config, f"text_config.model_type={config.text_config.model_type!r}", "Supported: decoders.")
        self.config = config
        self.text = text
        self.text.tied = is_tied(config)
        self._placeholder = next(name for name in placeholder if hasattr(config, name))

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.module, LANGUAGE)

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    def padded_vocab_size(self, tp: int) -> int:
        return self.text.padded_vocab_size(tp)

    def max_sequence_length(self, options: BuildOptions) -> int:
        return self.text.max_sequence_length(options)

    def check(self, layout: MimoLayout, options: BuildOptions) -> None:
        self.text.check(layout, options)
        self.check_encoder(layout)
        tp = layout.modules[self.module].tp
        check_divides("hidden_size of the language module", self.text.size.hidden_size, self.module, "tp", tp)
        if (token := getattr(self.config, self._placeholder)) >= self.vocab_size:
            raise ConfigError(
                f"config.json has {self._placeholder}={token}, but vocab_size={self.vocab_size}: the placeholder must "
                f"be one of the token ids 0 to {self.vocab_size - 1}."
            )

    def mimo_config(self, infra: MimoModelInfra, options: BuildOptions) -> MimoModelConfig:
        module = ModuleSpec(
            module=self.submodules,
            params={"pg_collection": infra.pg_collections.get(self.module)},
            submodules={
                "encoders": {self.encoder: self.encoder_spec(infra, options)},
                "input_projections": [self.projector_spec(infra)],
            },
        )
        token = getattr(self.config, self._placeholder)
        return MimoModelConfig(self.text.language_spec(infra, options), {self.module: module}, {self.module: token})

    def complete_format(self, expected: SampleFormat) -> SampleFormat:
        return expected

    @abstractmethod
    def check_encoder(self, layout: MimoLayout) -> None:
        """Refuse a layout that the encoder does not divide over."""

    @abstractmethod
    def encoder_spec(self, infra: MimoModelInfra, options: BuildOptions) -> ModuleSpec:
        """ModuleSpec of the encoder, whose features are projected."""

    @abstractmethod
    def projector_spec(self, infra: MimoModelInfra) -> ModuleSpec:
        """ModuleSpec of the projector of features, ``[rows, width] -> [rows, hidden]``."""

    @abstractmethod
    def rules(self, shapes: Mapping[str, Sequence[int]], padded_vocab_size: int) -> RuleTable:
        """The rules of all weights, given the shapes of the files' tensors and the rows of the embeddings."""

    def language_rules(
        self, shapes: Mapping[str, Sequence[int]], padded_vocab_size: int
    ) -> tuple[list[Rule], list[str]]:
        """Rules of the language module, and patterns of what it has no use for."""
        prefix, head = next((each for each in self.text_names if is_used(each[0], shapes)), self.text_names[0])
        return self.text.language_rules(padded_vocab_size, prefix=prefix, head=head)

    @property
    def encoder_prefix(self) -> str:
        """Of the encoder's parameters."""
        return f"{self.module}.encoders.{self.encoder}."

    @property
    def projector_prefix(self) -> str:
        """Of the projector's parameters."""
        return f"{self.module}.input_projections.0."

    def projector_config(
        self, infra: MimoModelInfra, *, bias: bool, activation: Activation = "gelu"
    ) -> TransformerConfig:
        """Config of a projector whose layers are as wide as the language module."""
        sizes = infra.layout.modules[self.module]
        size = TransformerSize(
            num_layers=sizes.pp,  # it has none of these, nor heads
            num_attention_heads=sizes.tp,
            hidden_size=self.text.size.hidden_size,
            ffn_hidden_size=self.text.size.hidden_size,
            activation=activation,
        )
        config = transformer_config(infra.layout, self.module, size)
        config.add_bias_linear = bias
        return config

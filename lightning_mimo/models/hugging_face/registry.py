"""Which family a config belongs to. A user's own is added with :func:`register`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from megatron.core.models.mimo import MimoModelConfig

from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.models.hugging_face.decoder import BuildOptions, text_model
from lightning_mimo.models.hugging_face.idefics3 import Idefics3Model
from lightning_mimo.models.hugging_face.llama import llama_size
from lightning_mimo.models.hugging_face.llava import LlavaModel
from lightning_mimo.models.hugging_face.llava_next import LlavaNextModel
from lightning_mimo.models.hugging_face.mixtral import MIXTRAL_EXPERTS, mixtral_size
from lightning_mimo.models.hugging_face.qwen import QWEN3_EXPERTS, qwen2_size, qwen3_moe_size, qwen3_size
from lightning_mimo.models.hugging_face.qwen2_audio import Qwen2AudioModel
from lightning_mimo.models.hugging_face.qwen_vl import QWEN2_5_VISION, QWEN2_VISION, QwenVLModel
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.weights.rules import RuleTable


class PretrainedModel(Protocol):
    """A model of a family, of the sizes that its config says."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names that the modules of the layout must have."""

    @property
    def vocab_size(self) -> int:
        """Rows of the word embeddings in the files."""

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the word embeddings in the model."""

    def max_sequence_length(self, options: BuildOptions) -> int:
        """Longest sequence in tokens."""

    def check(self, layout: MimoLayout, options: BuildOptions) -> None:
        """Refuse what cannot run, before any process starts."""

    def mimo_config(self, infra: MimoModelInfra, options: BuildOptions) -> MimoModelConfig:
        """Specs of all modules."""

    def complete_format(self, expected: SampleFormat) -> SampleFormat:
        """What its samples are read as, given what samples of all models are."""

    def rules(self, shapes: Mapping[str, Sequence[int]], padded_vocab_size: int) -> RuleTable:
        """The rules of all weights, given the shapes of the files' tensors and the rows of the embeddings."""


Family = Callable[[Any], PretrainedModel]

_FAMILIES: dict[str, Family] = {}


def register(model_type: str, family: Family) -> None:
    """Add a family, or replace one.

    Args:
        model_type: as in ``config.json``.
        family: makes a model of a config of transformers; raises ConfigError for what it does not cover.
    """
    _FAMILIES[model_type] = family


def model_of(config: Any) -> PretrainedModel:
    """The model that a config describes.

    Raises:
        ConfigError: if there is no family for it, or the family does not cover it.
    """
    if config.model_type not in _FAMILIES:
        raise ConfigError(
            f"config.json has model_type={config.model_type!r}; supported are {', '.join(sorted(_FAMILIES))}. Add your "
            f"own with lightning_mimo.models.hugging_face.registry.register({config.model_type!r}, ...)."
        )
    return _FAMILIES[config.model_type](config)


register("llama", text_model(llama_size))
register("mistral", text_model(llama_size))
register("qwen2", text_model(qwen2_size))
register("qwen3", text_model(qwen3_size))
register("mixtral", text_model(mixtral_size, experts=MIXTRAL_EXPERTS))
register("qwen3_moe", text_model(qwen3_moe_size, experts=QWEN3_EXPERTS))
register("llava", lambda config: LlavaModel(config, model_of))
register("qwen2_vl", lambda config: QwenVLModel(config, QWEN2_VISION))
register("qwen2_5_vl", lambda config: QwenVLModel(config, QWEN2_5_VISION))
register("llava_next", lambda config: LlavaNextModel(config, model_of))
register("idefics3", lambda config: Idefics3Model(config, model_of))
register("smolvlm", lambda config: Idefics3Model(config, model_of))
register("qwen2_audio", lambda config: Qwen2AudioModel(config, model_of))

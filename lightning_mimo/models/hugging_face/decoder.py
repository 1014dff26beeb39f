"""What decoders of the Llama kind share: rules of their weights, and a GPT of their sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.models.mimo import MimoModelConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.errors import ConfigError
from lightning_mimo.layers.attention import AttentionKind
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.models.gpt import gpt_spec
from lightning_mimo.models.hugging_face.config_values import refuse, sliding_window_of
from lightning_mimo.models.sizes import Recompute, TransformerSize, check_sizes, stage_ends
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.weights.rules import Concatenate, InterleaveGroups, PadVocabulary, Rename, Rule, RuleTable, Source

# Every published vocabulary of 32,000 tokens or more is a multiple of it, so that nothing is added to those.
_VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What a user chooses about a model whose sizes are given.

    Attributes:
        max_sequence_length: longest sequence in tokens; ``None`` for what the model was made for.
        sequence_parallel: as for :func:`lightning_mimo.models.gpt.gpt_spec`.
        attention: as for TransformerSize.
        recompute: of the language module, as for TransformerSize.
    """

    max_sequence_length: int | None = None
    sequence_parallel: bool = False
    attention: AttentionKind = "sdpa"
    recompute: Recompute | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """Names of a mixture of experts in the files, below the prefix of a layer.

    Attributes:
        router: weight of the router.
        expert: prefix of an expert, with ``{expert}``.
        gate: of the gated MLP.
        up: of the gated MLP.
        down: of the gated MLP.
    """

    router: str
    expert: str
    gate: str
    up: str
    down: str


def decoder_rules(
    size: TransformerSize,
    *,
    vocab_size: int,
    padded_vocab_size: int,
    tied: bool,
    prefix: str = "model.",
    head: str = "lm_head.weight",
    experts: ExpertNames | None = None,
) -> list[Rule]:
    """Rules of a decoder of the Llama kind.

    Args:
        size: of the decoder.
        vocab_size: rows of embeddings in the files.
        padded_vocab_size: rows of embeddings in the model.
        tied: whether the head shares the word embeddings.
        prefix: of the decoder's names in the files.
        head: the head's name in the files.
        experts: names of experts; ``None`` for a dense model.
    """
    table = (vocab_size, size.hidden_size)

    def vocabulary(target: str, source: str) -> Rule:
        return PadVocabulary(f"{LANGUAGE}.{target}", Source(name=source, shape=table), rows=padded_vocab_size)

    rules = [
        vocabulary("embedding.word_embeddings.weight", f"{prefix}embed_tokens.weight"),
        Rename(
            f"{LANGUAGE}.decoder.final_layernorm.weight",
            Source(name=f"{prefix}norm.weight", shape=(size.hidden_size,)),
        ),
    ]
    if not tied:
        rules.append(vocabulary("output_layer.weight", head))
    for layer in range(size.num_layers):
        ours, theirs = f"{LANGUAGE}.decoder.layers.{layer}.", f"{prefix}layers.{layer}."
        rules += _attention_rules(size, ours, theirs)
        rules += _mlp_rules(size, ours, theirs) if experts is None else _expert_rules(size, ours, theirs, experts)
    return rules


def _attention_rules(size: TransformerSize, ours: str, theirs: str) -> list[Rule]:
    hidden, head = size.hidden_size, size.head
    heads = {"q": size.num_attention_heads, "k": size.query_groups, "v": size.query_groups}

    def sources(kind: str, *columns: int) -> list[Source]:
        return [
            Source(name=f"{theirs}self_attn.{each}_proj.{kind}", shape=(number * head, *columns))
            for each, number in heads.items()
        ]

    def norm(target: str, source: str, width: int) -> Rule:
        return Rename(f"{ours}{target}.weight", Source(name=f"{theirs}{source}.weight", shape=(width,)))

    proj = Source(name=f"{theirs}self_attn.o_proj.weight", shape=(hidden, heads["q"] * head))
    qkv = f"{ours}self_attention.linear_qkv"
    rules = [
        norm("input_layernorm", "input_layernorm", hidden),
        norm("pre_mlp_layernorm", "post_attention_layernorm", hidden),
        InterleaveGroups(f"{qkv}.weight", sources("weight", hidden), groups=size.query_groups),
        Rename(f"{ours}self_attention.linear_proj.weight", proj),
    ]
    if size.qkv_bias:
        rules.append(InterleaveGroups(f"{qkv}.bias", sources("bias"), groups=size.query_groups))
    if size.attention_output_bias:
        bias = Source(name=f"{theirs}self_attn.o_proj.bias", shape=(hidden,))
        rules.append(Rename(f"{ours}self_attention.linear_proj.bias", bias))
    if size.qk_norm:
        rules.append(norm("self_attention.q_layernorm", "self_attn.q_norm", head))
        rules.append(norm("self_attention.k_layernorm", "self_attn.k_norm", head))
    return rules


def _mlp_rules(size: TransformerSize, ours: str, theirs: str) -> list[Rule]:
    names = ExpertNames(router="", expert="mlp.", gate="gate_proj", up="up_proj", down="down_proj")
    return _gated_rules(size, f"{ours}mlp.", f"{theirs}mlp.", names)


def _expert_rules(size: TransformerSize, ours: str, theirs: str, names: ExpertNames) -> list[Rule]:
    assert size.num_experts is not None, "names of experts come with experts"
    router = Source(name=f"{theirs}{names.router}", shape=(size.num_experts, size.hidden_size))
    rules = [Rename(f"{ours}mlp.router.weight", router)]
    for expert in range(size.num_experts):
        prefix = f"{theirs}{names.expert.format(expert=expert)}"
        rules += _gated_rules(size, f"{ours}mlp.experts.local_experts.{expert}.", prefix, names)
    return rules


def _gated_rules(size: TransformerSize, ours: str, theirs: str, names: ExpertNames) -> list[Rule]:
    wide, narrow = (size.ffn, size.hidden_size), (size.hidden_size, size.ffn)
    return [
        Concatenate(
            f"{ours}linear_fc1.weight",
            [Source(name=f"{theirs}{name}.weight", shape=wide) for name in (names.gate, names.up)],
        ),
        Rename(f"{ours}linear_fc2.weight", Source(name=f"{theirs}{names.down}.weight", shape=narrow)),
    ]


class TextModel:
    """A decoder of the Llama kind by itself. Its layout has the one module ``language``."""

    modules: tuple[str, ...] = (LANGUAGE,)

    def __init__(self, config: Any, size: TransformerSize, *, experts: ExpertNames | None = None) -> None:
        """
        Args:
            config: of transformers.
            size: what it comes to.
            experts: names of experts in the files; ``None`` for a dense model.
        """
        self.config = config
        self.size = size
        self.tied = bool(getattr(config, "tie_word_embeddings", False))
        self._experts = experts

    @property
    def vocab_size(self) -> int:
        """Rows of the embeddings in the files."""
        return self.config.vocab_size

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embeddings in the model, the same for every tp that is a power of two."""
        multiple = math.lcm(_VOCABULARY_MULTIPLE, tp)
        return math.ceil(self.vocab_size / multiple) * multiple

    def check(self, layout: MimoLayout, options: BuildOptions) -> None:
        """Refuse what cannot run. Needs no process.

        Raises:
            LayoutError: if the model does not divide over the layout.
            ConfigError: for a sequence length at which the model would compute something else.
        """
        check_sizes(layout, LANGUAGE, self._size(layout, options), sequence_parallel=options.sequence_parallel)
        length, window = self.max_sequence_length(options), sliding_window_of(self.config)
        if window is not None and length > window:
            raise refuse(
                self.config,
                f"sliding_window={window} with max_sequence_length={length}",
                f"Attention reaches all tokens here, which is the same up to the window: set "
                f"max_sequence_length={window} or less.",
            )
        if length > self.config.max_position_embeddings:
            raise ConfigError(
                f"max_sequence_length={length} is more than the {self.config.max_position_embeddings} positions "
                f"(max_position_embeddings) that the model was made for."
            )

    def language_spec(self, infra: MimoModelInfra, options: BuildOptions) -> ModuleSpec:
        """ModuleSpec of the language module."""
        tp = infra.layout.modules[LANGUAGE].tp
        return gpt_spec(
            infra,
            self._size(infra.layout, options),
            vocab_size=self.padded_vocab_size(tp),
            true_vocab_size=self.vocab_size,
            max_sequence_length=self.max_sequence_length(options),
            tie_embeddings=self.tied,
            sequence_parallel=options.sequence_parallel,
        )

    def mimo_config(self, infra: MimoModelInfra, options: BuildOptions) -> MimoModelConfig:
        """The whole model."""
        return MimoModelConfig(self.language_spec(infra, options), {}, {})

    def complete_format(self, expected: SampleFormat) -> SampleFormat:
        """What samples are read as: no more than all are."""
        return expected

    def language_rules(
        self, padded_vocab_size: int, *, prefix: str = "model.", head: str = "lm_head.weight"
    ) -> tuple[list[Rule], list[str]]:
        """Rules of the language module, and patterns of what it has no use for."""
        rules = decoder_rules(
            self.size,
            vocab_size=self.vocab_size,
            padded_vocab_size=padded_vocab_size,
            tied=self.tied,
            prefix=prefix,
            head=head,
            experts=self._experts,
        )
        return rules, ["*rotary_emb.inv_freq", *([head] if self.tied else [])]

    def rules(self, shapes: Mapping[str, Sequence[int]], padded_vocab_size: int) -> RuleTable:
        """The table of the whole model.

        Args:
            shapes: of the files' tensors, by which families with several versions of names tell them apart.
            padded_vocab_size: rows of the embeddings in the model.
        """
        rules, kept = self.language_rules(padded_vocab_size)
        return RuleTable(rules, kept=kept)

    def max_sequence_length(self, options: BuildOptions) -> int:
        """Longest sequence in tokens."""
        return options.max_sequence_length or self.config.max_position_embeddings

    def _size(self, layout: MimoLayout, options: BuildOptions) -> TransformerSize:
        first, last = stage_ends(self.size.num_layers, layout.modules[LANGUAGE].pp)
        return replace(
            self.size,
            first_stage_layers=first,
            last_stage_layers=last,
            attention=options.attention,
            recompute=options.recompute,
        )


def text_model(
    size: Callable[[Any], TransformerSize], *, experts: ExpertNames | None = None
) -> Callable[[Any], TextModel]:
    """What :func:`lightning_mimo.models.hugging_face.registry.register` takes for a decoder of the Llama kind.

    Args:
        size: of a config; raises ConfigError for what it does not cover.
        experts: names of experts in the files; ``None`` for a dense model.
    """
    return lambda config: TextModel(config, size(config), experts=experts)

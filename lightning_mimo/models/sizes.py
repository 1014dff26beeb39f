"""Dimensions of a transformer as a user specifies them, and their conversion to a TransformerConfig for a layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.activations import quick_gelu
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal

from lightning_mimo.errors import ConfigError, LayoutError
from lightning_mimo.layers.attention import AttentionKind, check_attention
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.initialization import fan_in_normal_

_EMBEDDING_STD = 0.02
# Far beyond any model. Without limits, a typing error would take hours to build.
_MOST_LAYERS, _MOST_EXPERTS, _WIDEST = 4_096, 4_096, 2**24

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": torch.nn.functional.silu,
    "relu": torch.nn.functional.relu,
}


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Activation recomputation: which activations are recomputed in the backward pass instead of being stored.

    Args:
        granularity: ``full`` for whole layers; ``selective`` for ``modules`` of each layer.
        method: for ``full`` only. ``uniform`` stores the input of every group of ``num_layers`` layers; ``block``
            recomputes only the first ``num_layers`` layers of a pipeline stage.
        num_layers: see ``method``.
        modules: for ``selective`` only: Megatron's ``recompute_modules``, such as ``core_attn``.
    """

    granularity: Literal["full", "selective"] = "full"
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1
    modules: tuple[str, ...] = ("core_attn",)

    def __post_init__(self) -> None:
        check_range(self, "num_layers", 1, _MOST_LAYERS)

    def settings(self) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig."""
        if self.granularity == "selective":
            return {"recompute_granularity": "selective", "recompute_modules": list(self.modules)}
        return {
            "recompute_granularity": "full",
            "recompute_method": self.method,
            "recompute_num_layers": self.num_layers,
        }


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Slower rotation for longer sequences, as Llama 3.1 has it.

    Args:
        factor: by which slow rotations are slowed down.
        low_freq_factor: rotations with fewer turns than this in the original length are slow.
        high_freq_factor: those with more turns than this stay as they are; in between it goes smoothly.
        original_max_position_embeddings: tokens that the model was first trained with.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """Dimensions of one transformer, with Megatron's names.

    Args:
        num_layers: transformer layers over all pipeline stages; pp must divide them, or what ``first_stage_layers`` and
            ``last_stage_layers`` leave for the other stages.
        hidden_size: width.
        num_attention_heads: heads; tp must divide them.
        num_query_groups: heads that keys and values have (grouped-query attention); ``None`` is as many as queries
            have. tp must divide them.
        ffn_hidden_size: width inside the MLP; ``None`` is 4 * hidden_size. tp must divide it.
        style: ``gpt`` has layer norms, GELU and biases; ``llama`` has RMS norms, SwiGLU and no biases.
        dropout: probability for hidden states and attention.
        num_experts: experts of every MLP; ``None`` is a dense model. ep must divide them.
        experts_per_token: experts that each token is sent to.
        balancing_loss: coefficient of the balancing loss of experts, the same in every layout; for the language module
            only. 0.01 is usual; with 0 experts may collapse. See :mod:`lightning_mimo.layers.balancing_loss`.
        recompute: which activations are computed again in the backward pass; ``None`` keeps all.
        attention: ``sdpa`` is torch's ``scaled_dot_product_attention``, whose memory does not grow with the sequence
            squared; ``megatron`` is megatron-core's own, unfused; ``te`` has all layers from Transformer Engine, which
            must be installed.
        head_dim: width of a head; ``None`` is hidden_size / num_attention_heads.
        layernorm_epsilon: added to variances in norms.
        activation: of the MLPs; ``None`` follows ``style``.
        qkv_bias: biases for queries, keys and values also where ``style`` has none.
        attention_output_bias: a bias on what attention gives also where ``style`` has none.
        qk_norm: norms of each head's queries and keys.
        rotary_base: longest period of rotary positions, over 2 pi; language modules only.
        rope_scaling: of rotary positions; language modules only.
        mrope_section: how many of the rotary frequencies turn with a token's position in time, in height and in width,
            together head_dim / 2; ``None`` where a token has one position; language modules only.
        normalize_experts: whether the weights of the experts of a token add up to 1.
        first_stage_layers: layers of the first pipeline stage, where stages differ.
        last_stage_layers: layers of the last pipeline stage, where stages differ.

    Raises:
        ConfigError: if a number is out of range, there is a balancing loss without experts, ``mrope_section`` does not
            add up, or ``attention`` is unknown, or is ``te`` but Transformer Engine is not installed.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None
    ffn_hidden_size: int | None = None
    style: Literal["gpt", "llama"] = "gpt"
    dropout: float = 0.0
    num_experts: int | None = None
    experts_per_token: int = 2
    balancing_loss: float = 0.0
    recompute: Recompute | None = None
    attention: AttentionKind = "sdpa"
    head_dim: int | None = None
    layernorm_epsilon: float = 1e-5
    activation: Activation | None = None
    qkv_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: bool = False
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    mrope_section: tuple[int, ...] | None = None
    normalize_experts: bool = True
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    def __post_init__(self) -> None:
        check_attention(self.attention)
        check_range(self, "num_layers", 1, _MOST_LAYERS)
        check_range(self, "num_experts", 1, _MOST_EXPERTS)
        for name in ("hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "head_dim"):
            check_range(self, name, 1, _WIDEST)
        check_range(self, "experts_per_token", 1, self.num_experts or _MOST_EXPERTS)
        for name in ("first_stage_layers", "last_stage_layers"):
            check_range(self, name, 1, self.num_layers)
        check_range(self, "dropout", 0.0, 1.0)
        for name in ("layernorm_epsilon", "rotary_base"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ConfigError(f"{type(self).__name__}({name}={value!r}) must be a positive number.")
        section = self.mrope_section
        if section is not None and (len(section) != 3 or 2 * sum(section) != self.head):
            raise ConfigError(
                f"mrope_section={list(section)} must be three numbers (time, height, width) that add up to half of "
                f"head_dim={self.head}, {self.head / 2:g}; they add up to {sum(section)}."
            )
        if self.balancing_loss < 0 or (self.balancing_loss and self.num_experts is None):
            raise ConfigError(
                f"TransformerSize(balancing_loss={self.balancing_loss}, num_experts={self.num_experts}): a balancing "
                f"loss is 0 or above, and needs num_experts."
            )

    @property
    def ffn(self) -> int:
        """Width of the hidden layer of the MLP."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def query_groups(self) -> int:
        """Number of key and value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


def check_range(options: Any, name: str, least: float, most: float) -> None:
    """Check that a field of a dataclass is a number in a range, or ``None`` if that is its default.

    Raises:
        ConfigError: naming the field and the range.
    """
    value = getattr(options, name)
    whole = isinstance(least, int)
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if value is None and type(options).__dataclass_fields__[name].default is None:
        return
    if not (is_number and least <= value <= most):
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{type(options).__name__}({name}={value!r}) must be {kind} from {least} to {most}.")


def transformer_config(
    layout: MimoLayout, module: str, size: TransformerSize, *, sequence_parallel: bool = False
) -> TransformerConfig:
    """Build Megatron's config of one transformer in a layout.

    Args:
        layout: the layout.
        module: name of the transformer's module.
        size: its dimensions.
        sequence_parallel: whether its sequence is divided over tensor-parallel ranks between attention and MLP.

    Raises:
        LayoutError: if heads, layers, the MLP's width or experts do not divide over the module's ranks.
    """
    sizes = layout.modules[module]
    check_sizes(layout, module, size, sequence_parallel=sequence_parallel)
    return TransformerConfig(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        num_attention_heads=size.num_attention_heads,
        num_query_groups=size.query_groups,
        kv_channels=size.head,
        mrope_section=list(size.mrope_section) if size.mrope_section else None,
        layernorm_epsilon=size.layernorm_epsilon,
        qk_layernorm=size.qk_norm,
        add_qkv_bias=size.qkv_bias,
        num_layers_in_first_pipeline_stage=size.first_stage_layers,
        num_layers_in_last_pipeline_stage=size.last_stage_layers,
        ffn_hidden_size=size.ffn,
        hidden_dropout=size.dropout,
        attention_dropout=size.dropout,
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        sequence_parallel=sequence_parallel,
        num_moe_experts=size.num_experts,
        moe_ffn_hidden_size=size.ffn if size.num_experts else None,
        moe_router_topk=size.experts_per_token,
        # The softmax over the chosen experts only, or over all of them.
        moe_router_pre_softmax=size.num_experts is not None and not size.normalize_experts,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.expt_tp,
        moe_token_dispatcher_type="alltoall",
        # A balancing loss is computed over the samples of one rank, so it would depend on the layout.
        moe_router_load_balancing_type="none",
        init_method=fan_in_normal_,
        output_layer_init_method=partial(fan_in_normal_, gain=1.0 / math.sqrt(2 * size.num_layers)),
        embedding_init_method=init_method_normal(_EMBEDDING_STD),
        embedding_init_method_std=_EMBEDDING_STD,
        pipeline_dtype=torch.float32,  # required for pipelines; overwritten by the run's precision
        moe_router_dtype="fp32" if size.num_experts else None,
        **_style(size),
        **(size.recompute.settings() if size.recompute else {}),
    )


def mlp_config(
    layout: MimoLayout, module: str, *, hidden_size: int, ffn_hidden_size: int, output_gain: float = 1.0
) -> TransformerConfig:
    """Build Megatron's config of a stand-alone MLP with GELU and biases, such as a projector.

    megatron-core configures an MLP with a TransformerConfig, whose fields for layers and attention are not used:
    ``num_attention_heads`` is tp, because upstream rejects fewer.

    Args:
        layout: the layout.
        module: name of the MLP's module.
        hidden_size: width of its output.
        ffn_hidden_size: width between its two layers; tp must divide it.
        output_gain: factor for the initial weights of the second layer.

    Raises:
        LayoutError: if the width does not divide over the module's ranks.
    """
    tp = layout.modules[module].tp
    check_divides("ffn_hidden_size", ffn_hidden_size, module, "tp", tp)
    return TransformerConfig(
        num_layers=1,
        hidden_size=hidden_size,
        num_attention_heads=tp,
        ffn_hidden_size=ffn_hidden_size,
        tensor_model_parallel_size=tp,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=fan_in_normal_,
        output_layer_init_method=partial(fan_in_normal_, gain=output_gain),
    )


def _style(size: TransformerSize) -> dict[str, Any]:
    if size.style == "gpt":
        return {
            "add_bias_linear": size.num_experts is None,
            "activation_func": _ACTIVATIONS[size.activation or "gelu"],
        }
    return {
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": _ACTIVATIONS[size.activation or "silu"],
    }


def check_sizes(layout: MimoLayout, module: str, size: TransformerSize, *, sequence_parallel: bool) -> None:
    """Refuse a transformer that does not divide over a layout; arguments as for :func:`transformer_config`.

    Raises:
        LayoutError: if heads, layers, the MLP's width or experts do not divide over the module's ranks.
    """
    sizes = layout.modules[module]
    check_divides("num_attention_heads", size.num_attention_heads, module, "tp", sizes.tp)
    check_divides("num_query_groups", size.query_groups, module, "tp", sizes.tp)
    _check_stages(size, module, sizes.pp)
    if size.num_experts is None:
        for axis in ("ep", "expt_tp"):
            if (degree := getattr(sizes, axis)) > 1:
                raise LayoutError(
                    f"Module {module!r}: {axis}={degree} divides experts, but num_experts is not set: the model is "
                    f"dense. Leave {axis} out, or set num_experts."
                )
        check_divides("ffn_hidden_size", size.ffn, module, "tp", sizes.tp)
    else:
        check_divides("num_experts", size.num_experts, module, "ep", sizes.ep)
        check_divides("ffn_hidden_size", size.ffn, module, "expt_tp", sizes.expt_tp)
        if sizes.tp > 1 and not sequence_parallel:
            raise LayoutError(
                f"Module {module!r}: a mixture of experts with tp={sizes.tp} needs sequence_parallel=True; otherwise "
                f"each token would be sent to its experts {sizes.tp} times."
            )
    if size.head_dim is None and size.hidden_size % size.num_attention_heads:
        raise LayoutError(
            f"Module {module!r}: num_attention_heads={size.num_attention_heads} does not divide "
            f"hidden_size={size.hidden_size} ({size.hidden_size} / {size.num_attention_heads} = "
            f"{size.hidden_size / size.num_attention_heads:g}). Choose another number of heads, or another hidden_size."
        )


def _check_stages(size: TransformerSize, module: str, pp: int) -> None:
    ends = {"first_stage_layers": size.first_stage_layers, "last_stage_layers": size.last_stage_layers}
    given = {name: layers for name, layers in ends.items() if layers is not None}
    if not given:
        check_divides("num_layers", size.num_layers, module, "pp", pp)
        return
    left, stages = size.num_layers - sum(given.values()), pp - len(given)
    if stages < 0 or left < 0 or (left % stages if stages else left):
        raise LayoutError(
            f"Module {module!r}: num_layers={size.num_layers} less "
            f"{' and '.join(f'{name}={layers}' for name, layers in given.items())} leaves {left} layers for {stages} "
            f"of pp={pp} pipeline stages, which must be divided evenly."
        )


def stage_ends(num_layers: int, pp: int) -> tuple[int | None, int | None]:
    """Layers of the first and of the last pipeline stage that divide all layers as evenly as Megatron can.

    ``None`` for both where pp divides them, or where only stages in the middle would have to differ.

    Example:
        >>> stage_ends(23, 4)  # 6, 6, 6 and 5
        (None, 5)
    """
    few, rest = divmod(num_layers, pp)
    if pp == 2 and rest:
        return few + 1, few
    ends = {1: (few + 1, None), 2: (few + 1, few + 1), pp - 2: (few, few), pp - 1: (None, few)}
    return ends.get(rest, (None, None)) if rest else (None, None)


def check_divides(what: str, number: int, module: str, axis: str, size: int) -> None:
    """Check that a parallel size divides a dimension of the model.

    Raises:
        LayoutError: if it does not; shows the arithmetic.
    """
    if number % size:
        raise LayoutError(
            f"Module {module!r}: {axis}={size} does not divide {what}={number} ({number} / {size} = "
            f"{number / size:g}). Choose a {axis} that does, or another {what}."
        )

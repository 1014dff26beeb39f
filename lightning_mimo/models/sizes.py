"""Dimensions of a transformer as a user writes them, and the TransformerConfig that they come to in a layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal

from lightning_mimo.errors import LayoutError
from lightning_mimo.layers.attention import AttentionKind, check_attention
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.initialization import fan_in_normal_

_EMBEDDING_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Which activations of a transformer are computed again in the backward pass in place of being kept.

    Args:
        granularity: ``full`` for whole layers; ``selective`` for ``modules`` of each layer.
        method: with ``full``: ``uniform`` keeps the input of every ``num_layers`` layers, ``block`` recomputes only the
            first ``num_layers`` of a pipeline stage.
        num_layers: see ``method``.
        modules: with ``selective``: Megatron's ``recompute_modules``, such as ``core_attn``.
    """

    granularity: Literal["full", "selective"] = "full"
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1
    modules: tuple[str, ...] = ("core_attn",)

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
class TransformerSize:
    """Dimensions of one transformer, with Megatron's names.

    Args:
        num_layers: transformer layers over all pipeline stages; pp must divide them.
        hidden_size: width.
        num_attention_heads: heads; tp must divide them.
        num_query_groups: heads that keys and values have (grouped-query attention); ``None`` is as many as queries
            have. tp must divide them.
        ffn_hidden_size: width inside the MLP; ``None`` is 4 * hidden_size. tp must divide it.
        style: ``gpt`` has layer norms, GELU and biases; ``llama`` has RMS norms, SwiGLU and no biases.
        dropout: probability for hidden states and attention.
        num_experts: experts of every MLP; ``None`` is a dense model. ep must divide them. No balancing loss is added.
        experts_per_token: experts that each token is sent to.
        recompute: which activations are computed again in the backward pass; ``None`` keeps all.
        attention: ``sdpa`` is torch's ``scaled_dot_product_attention``, whose memory does not grow with the sequence
            squared; ``megatron`` is megatron-core's own, unfused; ``te`` has all layers from Transformer Engine, which
            must be installed.

    Raises:
        ValueError: if ``attention`` is unknown, or ``te`` where Transformer Engine is not installed.
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
    recompute: Recompute | None = None
    attention: AttentionKind = "sdpa"

    def __post_init__(self) -> None:
        check_attention(self.attention)

    @property
    def ffn(self) -> int:
        """Width inside the MLP."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def query_groups(self) -> int:
        """Heads of keys and values."""
        return self.num_query_groups or self.num_attention_heads


def transformer_config(
    layout: MimoLayout, module: str, size: TransformerSize, *, sequence_parallel: bool = False
) -> TransformerConfig:
    """Megatron's config of one transformer in a layout.

    Args:
        layout: what runs where.
        module: the transformer's module.
        size: its dimensions.
        sequence_parallel: whether its sequence is divided over tensor-parallel ranks between attention and MLP.

    Raises:
        LayoutError: if heads, layers, the MLP's width or experts do not divide over the module's ranks.
    """
    sizes = layout.modules[module]
    _check_sizes(layout, module, size, sequence_parallel=sequence_parallel)
    return TransformerConfig(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        num_attention_heads=size.num_attention_heads,
        num_query_groups=size.query_groups,
        ffn_hidden_size=size.ffn,
        hidden_dropout=size.dropout,
        attention_dropout=size.dropout,
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        sequence_parallel=sequence_parallel,
        num_moe_experts=size.num_experts,
        moe_ffn_hidden_size=size.ffn if size.num_experts else None,
        moe_router_topk=size.experts_per_token,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.expt_tp,
        moe_token_dispatcher_type="alltoall",
        # A balancing loss is taken over the samples of one rank, so it would not be the same in every layout.
        moe_router_load_balancing_type="none",
        init_method=fan_in_normal_,
        output_layer_init_method=partial(fan_in_normal_, gain=1.0 / math.sqrt(2 * size.num_layers)),
        embedding_init_method=init_method_normal(_EMBEDDING_STD),
        embedding_init_method_std=_EMBEDDING_STD,
        pipeline_dtype=torch.float32,  # must be set for pipelines; the run's precision takes its place
        moe_router_dtype="fp32" if size.num_experts else None,
        **_style(size),
        **(size.recompute.settings() if size.recompute else {}),
    )


def mlp_config(
    layout: MimoLayout, module: str, *, hidden_size: int, ffn_hidden_size: int, output_gain: float = 1.0
) -> TransformerConfig:
    """Megatron's config of an MLP that stands alone, with GELU and biases, such as a projector.

    megatron-core knows an MLP by a TransformerConfig only. What concerns layers and attention in it is not read here:
    ``num_attention_heads`` is tp, because upstream refuses fewer.

    Args:
        layout: what runs where.
        module: the MLP's module.
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
        return {"add_bias_linear": size.num_experts is None}
    return {
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
    }


def _check_sizes(layout: MimoLayout, module: str, size: TransformerSize, *, sequence_parallel: bool) -> None:
    sizes = layout.modules[module]
    check_divides("num_attention_heads", size.num_attention_heads, module, "tp", sizes.tp)
    check_divides("num_query_groups", size.query_groups, module, "tp", sizes.tp)
    check_divides("num_layers", size.num_layers, module, "pp", sizes.pp)
    if size.num_experts is None:
        check_divides("ffn_hidden_size", size.ffn, module, "tp", sizes.tp)
    else:
        check_divides("num_experts", size.num_experts, module, "ep", sizes.ep)
        check_divides("ffn_hidden_size", size.ffn, module, "expt_tp", sizes.expt_tp)
        if sizes.tp > 1 and not sequence_parallel:
            raise LayoutError(
                f"Module {module!r}: a mixture of experts with tp={sizes.tp} needs sequence_parallel=True, or each "
                f"token would be sent to its experts {sizes.tp} times."
            )
    if size.hidden_size % size.num_attention_heads:
        raise LayoutError(
            f"Module {module!r}: num_attention_heads={size.num_attention_heads} does not divide "
            f"hidden_size={size.hidden_size} ({size.hidden_size} / {size.num_attention_heads} = "
            f"{size.hidden_size / size.num_attention_heads:g}). Choose heads that do, or another width."
        )


def check_divides(what: str, number: int, module: str, axis: str, size: int) -> None:
    """Refuse a parallel size that does not divide what it cuts.

    Raises:
        LayoutError: with the arithmetic.
    """
    if number % size:
        raise LayoutError(
            f"Module {module!r}: {axis}={size} does not divide {what}={number} ({number} / {size} = "
            f"{number / size:g}). Choose a {axis} that does, or another {what}."
        )

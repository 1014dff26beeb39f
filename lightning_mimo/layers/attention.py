"""Core attention on torch's ``scaled_dot_product_attention``, whose memory does not grow with the sequence squared."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Literal, get_args

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from lightning_mimo.errors import ConfigError

AttentionKind = Literal["sdpa", "megatron", "te"]

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
# torch 2.11 has varlen_attn, but only for as many heads of keys as of queries.
_VARLEN_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def check_attention(kind: AttentionKind) -> None:
    """Refuse an attention that is unknown or not installed.

    Raises:
        ConfigError: with the remedy.
    """
    if kind not in get_args(AttentionKind):
        raise ConfigError(f"attention={kind!r} is not one of {', '.join(map(repr, get_args(AttentionKind)))}.")
    if kind == "te" and not HAVE_TE:
        raise ConfigError(
            "attention='te' needs Transformer Engine, which cannot be imported here. Install it (pip install "
            "'transformer-engine[pytorch]', for CUDA), or choose attention='sdpa', which needs torch alone."
        )


class SdpaAttention(DotProductAttention):
    """megatron-core's core attention, computed by torch's ``scaled_dot_product_attention``.

    Megatron's own holds ``[b, heads, s, s]`` until the backward pass; torch's kernels hold ``[b, s, hidden]`` on a GPU
    and on the CPU alike. With dropout the CPU has no such kernel and holds as much as Megatron's.

    Packed sequences go through one kernel on a GPU, which knows their lengths there. That kernel takes bfloat16 and
    float16 and has no dropout; otherwise, and on the CPU, they go one after the other, and the host reads the lengths.

    Rows that a mask leaves nothing to attend to come out as 0; Megatron's own are the mean of all values.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """Arguments as for Megatron's.

        Raises:
            ValueError: if the config wants what this attention cannot do.
        """
        _check_config(config, layer_number, attn_mask_type)
        super().__init__(
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            attention_dropout=attention_dropout,
            softmax_scale=softmax_scale,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        if config.apply_query_key_layer_scaling:
            # Megatron divides before its softmax, to stay in float16's range, and multiplies within. SDPA need not.
            self.softmax_scale *= self.layer_number

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend with this rank's heads.

        Args:
            query: ``[sq, b, heads / tp, head]``; packed ``[tokens, heads / tp, head]``.
            key: ``[sk, b, groups / tp, head]``; packed ``[tokens, groups / tp, head]``.
            value: as ``key``.
            attention_mask: bool, broadcastable to ``[b, heads / tp, sq, sk]``, True where a query must not see a key.
                As with Megatron's own, a causal layer that is given a mask is masked by that alone; with
                ``padding_causal`` it is masked by both. ``None`` for packed sequences.
            attn_mask_type: in the place of the layer's own.
            attention_bias: must be ``None``.
            packed_seq_params: in the format ``thd``: where each of several sequences in one row ends. ``cu_seqlens_q``
                (``cu_seqlens_q_padded``, where there is padding between sequences) must end at the number of tokens.
                Those of keys must be the same.

        Returns:
            ``[sq, b, hidden / tp]``, packed ``[tokens, hidden / tp]``.

        Raises:
            ValueError: for a bias, a mask that is not bool, packed sequences that do not cover the tokens, or causal
                attention between different numbers of queries and keys.
        """
        if attention_bias is not None:
            raise ConfigError("SdpaAttention takes no attention_bias. Choose attention='te' for it.")
        if key.is_contiguous():
            # Rotary positions have made new queries and keys: a view would keep what all three were projected to.
            value = value.contiguous()
        mask_type = attn_mask_type or self.attn_mask_type
        causal, mask = mask_type in _CAUSAL, None
        with self._dropout_generator():
            if packed_seq_params is not None:
                _check_packed(packed_seq_params, attention_mask)
                return self._attend_packed(query, key, value, packed_seq_params, causal=causal).flatten(1)
            if attention_mask is not None:
                mask = _allowed(attention_mask, query.size(0), causal=mask_type == AttnMaskType.padding_causal)
            batch_first = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            # One query alone is the newest of those whose keys are kept, and sees all.
            context = self._attend(*batch_first, mask=mask, causal=causal and mask is None and query.size(0) > 1)
        return context.permute(2, 0, 1, 3).flatten(2)

    @property
    def _dropout(self) -> float:
        return self.attention_dropout.p if self.training else 0.0

    def _dropout_generator(self) -> AbstractContextManager[None]:
        """Each tensor-parallel rank drops its own; with sequence parallelism the whole block draws its own already."""
        if self._dropout and not self.config.sequence_parallel:
            return get_cuda_rng_tracker().fork()
        return nullcontext()

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: torch.Tensor | None, causal: bool
    ) -> torch.Tensor:
        """``[b, heads, sq, head], 2 * [b, groups, sk, head] -> [b, heads, sq, head]``"""
        if causal and query.size(2) != key.size(2):
            raise ConfigError(
                f"Causal attention of {query.size(2)} queries to {key.size(2)} keys: which query sees which key is "
                f"not defined. Give an attention_mask."
            )
        grouped = query.size(1) != key.size(1)
        if grouped and not _takes_groups(query, key, value, mask, self._dropout, causal=causal):
            key, value, grouped = _expand(key, query, dim=1), _expand(value, query, dim=1), False
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self._dropout,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=grouped,
        )

    def _attend_packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams, *, causal: bool
    ) -> torch.Tensor:
        """``[tokens, heads, head], 2 * [tokens, groups, head] -> [tokens, heads, head]``"""
        ends = _ends(packed)
        if not self._dropout and _varlen_can(query, key, value):
            return self._attend_varlen(query, key, value, packed, ends, causal=causal)
        lengths = _checked_lengths(packed, ends.tolist(), query.size(0))
        parts = [
            self._attend(*(part.transpose(0, 1).unsqueeze(0) for part in sequence), mask=None, causal=causal)
            for sequence in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        ]
        return torch.cat([part.squeeze(0).transpose(0, 1) for part in parts])

    def _attend_varlen(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedSeqParams,
        ends: torch.Tensor,
        *,
        causal: bool,
    ) -> torch.Tensor:
        """All sequences in one kernel, without asking the device how long they are."""
        # What no sequence covers would be whatever the memory held. The host does not know; the device stops.
        torch._assert_async(ends[-1] == query.size(0))
        groups = {"enable_gqa": True} if query.size(1) != key.size(1) else {}
        if groups and not _VARLEN_TAKES_GROUPS:
            key, value, groups = _expand(key, query, dim=1), _expand(value, query, dim=1), {}
        is_padded = packed.cu_seqlens_q_padded is not None
        # Padding may be longer than the longest sequence.
        longest = query.size(0) if is_padded or packed.max_seqlen_q is None else packed.max_seqlen_q
        return varlen_attn(
            query,
            key,
            value,
            ends,
            ends,
            longest,
            longest,
            scale=self.softmax_scale,
            window_size=(-1, 0) if causal else (-1, -1),
            **groups,
        )


def _check_config(config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType) -> None:
    refused = {
        f"context_parallel_size={config.context_parallel_size}": config.context_parallel_size > 1,
        f"softmax_type={config.softmax_type!r} (a softmax offset)": config.softmax_type != "vanilla",
        f"window_size={config.window_size}": is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        ),
        "qk_clip=True": config.qk_clip,
        "log_max_attention_logit=True": config.log_max_attention_logit,
        "fp8_dot_product_attention=True": config.fp8_dot_product_attention,
        "attn_mask_type=causal_bottom_right": attn_mask_type == AttnMaskType.causal_bottom_right,
    }
    if wanted := [what for what, is_wanted in refused.items() if is_wanted]:
        raise ConfigError(
            f"Layer {layer_number}: SdpaAttention cannot do {', '.join(wanted)}. Leave that out of the "
            f"TransformerConfig, or choose attention='te' ('megatron' can do window_size and softmax_type, too)."
        )


def _check_packed(packed: PackedSeqParams, attention_mask: torch.Tensor | None) -> None:
    if packed.qkv_format != "thd":
        raise ConfigError(f"packed_seq_params.qkv_format is {packed.qkv_format!r}; SdpaAttention takes 'thd' only.")
    if packed.cu_seqlens_q is None:
        raise ConfigError("packed_seq_params.cu_seqlens_q is None: it must say where each sequence ends.")
    if attention_mask is not None:
        raise ConfigError("Packed sequences take no attention_mask: packed_seq_params says who sees whom.")


def _allowed(attention_mask: torch.Tensor, queries: int, *, causal: bool) -> torch.Tensor:
    """Where torch wants True: where a query sees a key."""
    if attention_mask.dtype != torch.bool:
        raise ConfigError(
            f"attention_mask is {attention_mask.dtype}; it must be bool, True where a query must not see a key."
        )
    allowed = ~attention_mask
    if causal:
        keys = attention_mask.size(-1)
        allowed = allowed & allowed.new_ones(queries, keys).tril()
    return allowed


def _takes_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    *,
    causal: bool,
) -> bool:
    """Whether torch has a kernel for fewer heads of keys; otherwise it would fall back to one that holds [s, s]."""
    if not query.is_cuda:
        return True
    parameters = torch.backends.cuda.SDPAParams(query, key, value, mask, dropout, causal, True)
    return torch.backends.cuda.can_use_flash_attention(parameters)


def _varlen_can(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's kernel for packed sequences takes these on this device: as flash attention does, but unpadded."""
    if not query.is_cuda or query.size(-1) % 8:
        return False
    batch = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    parameters = torch.backends.cuda.SDPAParams(*batch, None, 0.0, False, query.size(1) != key.size(1))
    return torch.backends.cuda.can_use_flash_attention(parameters)


def _expand(tensor: torch.Tensor, query: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Keys or values, each head as often as queries share it."""
    return tensor.repeat_interleave(query.size(dim) // tensor.size(dim), dim=dim)


def _ends(packed: PackedSeqParams) -> torch.Tensor:
    """int32 ``[n + 1]``: where sequences start and end, with padding after a sequence as one more of its own."""
    ends = packed.cu_seqlens_q
    if packed.cu_seqlens_q_padded is not None:
        starts = packed.cu_seqlens_q_padded
        padding = starts[:-1] + ends.diff()
        ends = torch.cat([torch.stack([starts[:-1], padding], dim=1).flatten(), starts[-1:]])
    return ends.to(torch.int32)


def _checked_lengths(packed: PackedSeqParams, ends: Sequence[int], tokens: int) -> list[int]:
    """Of every sequence that is not empty.

    Raises:
        ConfigError: if they do not cover the tokens, or keys have others than queries.
    """
    lengths = [end - start for start, end in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != tokens or min(lengths, default=0) < 0:
        raise ConfigError(
            f"Packed sequences must cover all {tokens} tokens of the row, one after the other, from 0 to {tokens}; "
            f"cu_seqlens say {list(ends)}."
        )
    for of_keys, of_queries in (
        (packed.cu_seqlens_kv, packed.cu_seqlens_q),
        (packed.cu_seqlens_kv_padded, packed.cu_seqlens_q_padded),
    ):
        if of_keys is not None and (of_queries is None or not torch.equal(of_keys, of_queries)):
            raise ConfigError("Packed sequences: cu_seqlens of keys must be those of queries (self-attention).")
    return [length for length in lengths if length]

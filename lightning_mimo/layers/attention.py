"""Core attention with torch's ``scaled_dot_product_attention``, whose memory is linear in the sequence length."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Literal, get_args

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
# varlen_attn of torch 2.11 requires as many key heads as query heads.
_VARLEN_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def check_attention(kind: AttentionKind) -> None:
    """Check that an attention implementation exists and is installed.

    Raises:
        ConfigError: naming the alternatives.
    """
    if kind not in get_args(AttentionKind):
        raise ConfigError(f"attention={kind!r} is not one of {', '.join(map(repr, get_args(AttentionKind)))}.")
    if kind == "te" and not HAVE_TE:
        raise ConfigError(
            "attention='te' needs Transformer Engine, which cannot be imported here. Install it (pip install "
            "'transformer-engine[pytorch]', for CUDA), or choose attention='sdpa', which needs torch alone."
        )


def check_packed_attention(kind: AttentionKind) -> None:
    """Check that an attention implementation keeps the samples of a packed row apart.

    Raises:
        ConfigError: if it does not, or has not been shown to.
    """
    if kind != "sdpa":
        why = "takes no packed sequences" if kind == "megatron" else "is not supported with packed rows here"
        raise ConfigError(
            f"MimoStrategy(pack_to=...) needs attention='sdpa' in the language module; attention={kind!r} {why}. "
            f"Choose 'sdpa', or leave pack_to out."
        )


class SdpaAttention(DotProductAttention):
    """megatron-core's core attention, computed with torch's ``scaled_dot_product_attention``.

    Megatron's ``DotProductAttention`` keeps ``[b, heads, s, s]`` for the backward pass. torch's kernels keep
    ``[b, s, hidden]``, both on GPUs and on CPUs. Exception: with dropout, the CPU has no such kernel and needs as much
    memory as Megatron's implementation.

    Packed sequences are computed by one kernel on a GPU, which reads their lengths on the device. That kernel supports
    bfloat16 and float16 without dropout. In all other cases sequences are computed one after the other, and the host
    reads their lengths.

    Query rows for which the mask allows no key are 0; with Megatron's implementation they are the mean of all values.
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
        """Arguments as for megatron-core's ``DotProductAttention``.

        Raises:
            ConfigError: if the config needs a feature that this attention does not support.
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
            # Megatron divides by it before the softmax, to stay in the range of float16, and multiplies within the
            # softmax. torch's kernels need neither.
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
        """Compute attention for the heads of this rank.

        Args:
            query: ``[sq, b, heads / tp, head]``; packed ``[tokens, heads / tp, head]``.
            key: ``[sk, b, groups / tp, head]``; packed ``[tokens, groups / tp, head]``.
            value: same shape as ``key``.
            attention_mask: bool, broadcastable to ``[b, heads / tp, sq, sk]``, True where a query must not see a key.
                As in Megatron, a mask replaces the causal mask of a ``causal`` layer and is combined with that of a
                ``padding_causal`` layer. Must be ``None`` for packed sequences.
            attn_mask_type: overrides the mask type of the layer.
            attention_bias: must be ``None``.
            packed_seq_params: boundaries of several sequences in one row, in the format ``thd``. ``cu_seqlens_q``, or
                ``cu_seqlens_q_padded`` if there is padding between sequences, must end at the number of tokens. The
                boundaries of keys must be equal to those of queries. Example: sequences of 3 and 5 tokens have
                ``cu_seqlens_q = [0, 3, 8]``.

        Returns:
            ``[sq, b, hidden / tp]``; packed ``[tokens, hidden / tp]``.

        Raises:
            ConfigError: for a bias, a mask that is not bool, packed sequences that do not cover the tokens, or causal
                attention with different numbers of queries and keys.
        """
        if attention_bias is not None:
            raise ConfigError("SdpaAttention takes no attention_bias. Choose attention='te', which does.")
        if key.is_contiguous():
            # Rotary embeddings made new tensors of queries and keys. As a view, value alone would keep the memory of
            # the joint projection.
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
            # A single query (generation with a key cache) is the newest token and sees all keys.
            context = self._attend(*batch_first, mask=mask, causal=causal and mask is None and query.size(0) > 1)
        return context.permute(2, 0, 1, 3).flatten(2)

    @property
    def _dropout(self) -> float:
        return self.attention_dropout.p if self.training else 0.0

    def _dropout_generator(self) -> AbstractContextManager[None]:
        """Context in which each tensor-parallel rank draws its own dropout mask.

        With sequence parallelism the layers around already run in such a context.
        """
        if self._dropout and not self.config.sequence_parallel:
            return get_cuda_rng_tracker().fork()
        return nullcontext()

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: torch.Tensor | None, causal: bool
    ) -> torch.Tensor:
        """``[b, heads, sq, head], 2 * [b, groups, sk, head] -> [b, heads, sq, head]``"""
        if causal and query.size(2) != key.size(2):
            raise ConfigError(
                f"Causal attention of {query.size(2)} queries to {key.size(2)} keys is ambiguous: the position of the "
                f"queries is not known. Give an attention_mask."
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
        """Compute all sequences in one kernel, without copying their lengths to the host."""
        # Tokens outside all sequences would have undefined values.
        if ends.is_cuda:  # the host cannot check this without waiting
            torch._assert_async(ends[-1] == query.size(0))
        else:
            _checked_lengths(packed, ends.tolist(), query.size(0))
            ends = ends.to(query.device, non_blocking=True)
        groups: dict[str, Any] = {"enable_gqa": True} if query.size(1) != key.size(1) else {}
        if groups and not _VARLEN_TAKES_GROUPS:
            key, value, groups = _expand(key, query, dim=1), _expand(value, query, dim=1), {}
        is_padded = packed.cu_seqlens_q_padded is not None
        # Padding counts as a sequence and may be longer than max_seqlen_q.
        longest = query.size(0) if is_padded or packed.max_seqlen_q is None else packed.max_seqlen_q
        attended = varlen_attn(
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
        assert isinstance(attended, torch.Tensor), "a tuple only with return_aux"
        return attended


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
            f"Layer {layer_number}: SdpaAttention does not support {', '.join(wanted)}. Remove it from the "
            f"TransformerConfig, or choose attention='te' ('megatron' also supports window_size and softmax_type)."
        )


def _check_packed(packed: PackedSeqParams, attention_mask: torch.Tensor | None) -> None:
    if packed.qkv_format != "thd":
        raise ConfigError(f"packed_seq_params.qkv_format is {packed.qkv_format!r}; SdpaAttention takes 'thd' only.")
    if packed.cu_seqlens_q is None:
        raise ConfigError("packed_seq_params.cu_seqlens_q is None: it must say where each sequence ends.")
    if attention_mask is not None:
        raise ConfigError(
            "Packed sequences take no attention_mask: packed_seq_params defines which tokens see each other."
        )


def _allowed(attention_mask: torch.Tensor, queries: int, *, causal: bool) -> torch.Tensor:
    """Mask as torch expects it: True where a query sees a key."""
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
    """Whether torch has a memory-efficient kernel for fewer key heads than query heads.

    Otherwise torch would fall back to an implementation that keeps ``[b, heads, s, s]``.
    """
    if not query.is_cuda:
        return True
    parameters = torch.backends.cuda.SDPAParams(query, key, value, mask, dropout, causal, True)
    return torch.backends.cuda.can_use_flash_attention(parameters)


def _varlen_can(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's kernel for packed sequences supports these tensors on this device.

    It has the requirements of flash attention, and does not pad the head size to a multiple of 8.
    """
    if not query.is_cuda or query.size(-1) % 8:
        return False
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, query.size(1) != key.size(1))
    return torch.backends.cuda.can_use_flash_attention(parameters)


def _expand(tensor: torch.Tensor, query: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Repeat each head of keys or values for all query heads that share it."""
    return tensor.repeat_interleave(query.size(dim) // tensor.size(dim), dim=dim)


def _ends(packed: PackedSeqParams) -> torch.Tensor:
    """Boundaries of all sequences, int32 ``[n + 1]``. Padding after a sequence counts as a separate sequence."""
    ends = packed.cu_seqlens_q
    if packed.cu_seqlens_q_padded is not None:
        starts = packed.cu_seqlens_q_padded
        padding = starts[:-1] + ends.diff()
        ends = torch.cat([torch.stack([starts[:-1], padding], dim=1).flatten(), starts[-1:]])
    return ends.to(torch.int32)


def _checked_lengths(packed: PackedSeqParams, ends: Sequence[int], tokens: int) -> list[int]:
    """Lengths of all sequences that are not empty.

    Raises:
        ConfigError: if the sequences do not cover all tokens, or the boundaries of keys and queries differ.
    """
    lengths = [end - start for start, end in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != tokens or min(lengths, default=0) < 0:
        raise ConfigError(
            f"Packed sequences must cover all {tokens} tokens of the row in order, from 0 to {tokens}; cu_seqlens are "
            f"{list(ends)}."
        )
    for of_keys, of_queries in (
        (packed.cu_seqlens_kv, packed.cu_seqlens_q),
        (packed.cu_seqlens_kv_padded, packed.cu_seqlens_q_padded),
    ):
        if of_keys is not None and (of_queries is None or not torch.equal(of_keys, of_queries)):
            raise ConfigError("Packed sequences: cu_seqlens of keys must equal those of queries (self-attention).")
    return [length for length in lengths if length]

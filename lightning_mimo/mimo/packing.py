"""Several samples in one row of the language module, each with attention and positions of its own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding
from megatron.core.transformer.attention import Attention
from megatron.core.utils import unwrap_model

from lightning_mimo.errors import ConfigError
from lightning_mimo.layers.attention import SdpaAttention

_FOLLOWS_POSITIONS = ("rope", "mrope", "learned_absolute", "none")


def packing_arguments(lengths: Sequence[int], padding: int) -> dict[str, Any]:
    """Arguments of megatron-core's PackedSeqParams, in the format ``thd``.

    The boundaries stay on the CPU, where megatron-core's rotary embeddings and :class:`SdpaAttention` read them without
    waiting for the device.

    Args:
        lengths: tokens of each sample.
        padding: tokens after the last one, which are a sequence of their own.
    """
    sequences = [*lengths, padding] if padding else list(lengths)
    ends = torch.tensor([0, *accumulate(sequences)], dtype=torch.int32, device="cpu")
    longest = max(sequences)
    return {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": longest, "max_seqlen_kv": longest}


def check_packing(language_model: torch.nn.Module, position_type: str | None) -> None:
    """Check that a language module keeps the samples of a packed row apart.

    Args:
        language_model: of this rank, wrapped or not.
        position_type: its ``position_embedding_type``; ``None`` if unknown.

    Raises:
        ConfigError: naming the part that does not.
    """
    model = unwrap_model(language_model)
    name = type(model).__name__
    if "packed_seq_params" not in inspect.signature(model.forward).parameters:
        raise _refused(f"the forward() of the language module {name} takes no packed_seq_params")
    if position_type is not None and position_type not in _FOLLOWS_POSITIONS:
        raise _refused(
            f"{name} has position_embedding_type={position_type!r}, which counts on from one sample to the next"
        )
    rotary = getattr(model, "rotary_pos_emb", None)
    if rotary is not None and not isinstance(rotary, RotaryEmbedding | MultimodalRotaryEmbedding):
        raise _refused(f"the positions of {name} are a {type(rotary).__name__}, which does not take those of samples")
    if getattr(getattr(model, "config", None), "mtp_num_layers", None):
        raise _refused(f"{name} predicts several tokens (mtp_num_layers), across the boundaries of samples")
    for path, part in model.named_modules():
        if isinstance(part, Attention) and not isinstance(part.core_attention, SdpaAttention):
            kind = type(part.core_attention).__name__
            raise _refused(f"{path}.core_attention is a {kind}, not an SdpaAttention (attention='sdpa')")


def _refused(why: str) -> ConfigError:
    return ConfigError(
        f"MimoStrategy(pack_to=...) is not possible with this model: {why}. Samples would see each other. Leave "
        f"pack_to out, or change the model."
    )

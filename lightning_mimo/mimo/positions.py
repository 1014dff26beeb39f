"""Rotary embeddings at positions that a sample specifies, instead of 0, 1, 2, …, with every digit of float32."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding


class RotaryPositions:
    """Makes a RotaryEmbedding of megatron-core, which counts positions from 0, use position ids.

    Attributes:
        positions: position ids of the next forward pass, int64 ``[b, s]``; ``None`` to count from 0.
    """

    def __init__(self, rotary: RotaryEmbedding) -> None:
        """
        Args:
            rotary: the language module's RotaryEmbedding; a forward hook is added to it.
        """
        self.positions: torch.Tensor | None = None
        rotary.register_forward_hook(self._replace)

    def _replace(self, rotary: RotaryEmbedding, args: tuple[Any, ...], angles: torch.Tensor) -> torch.Tensor | None:
        """Replace angles ``[s, 1, 1, dim]`` by ``[s, b, 1, dim]``, computed with the same arithmetic."""
        if self.positions is None:
            return None
        frequencies = rotary.inv_freq
        positions = self.positions.t().to(device=frequencies.device, dtype=frequencies.dtype)
        if rotary.seq_len_interpolation_factor is not None:
            positions = positions * (1 / rotary.seq_len_interpolation_factor)
        half = positions.unsqueeze(-1) * frequencies
        both = torch.stack((half, half), dim=-1) if rotary.rotary_interleaved else torch.cat((half, half), dim=-1)
        return both.flatten(2).unsqueeze(2)


def _in_full_precision(
    rotary: MultimodalRotaryEmbedding, args: tuple[torch.Tensor, list[int]], angles: torch.Tensor
) -> torch.Tensor:
    """The angles ``[s, b, 1, dim]`` of positions ``[3, b, s]``, as products of single numbers.

    megatron-core multiplies matrices, which torch.set_float32_matmul_precision("high") rounds to 11 bits: a position of
    4097 would be 4096.
    """
    positions, section = args
    frequencies = rotary.inv_freq
    positions = positions.to(device=frequencies.device, dtype=frequencies.dtype)
    if rotary.seq_len_interpolation_factor is not None:
        positions = positions * (1 / rotary.seq_len_interpolation_factor)
    halves = (positions.unsqueeze(-1) * frequencies).split(list(section), dim=-1)
    half = torch.cat([part[axis % 3] for axis, part in enumerate(halves)], dim=-1)
    return torch.cat((half, half), dim=-1).transpose(0, 1).unsqueeze(2).contiguous()


def follow_positions(language_model: torch.nn.Module) -> RotaryPositions | None:
    """Make a language module use the positions of samples; ``None`` if it already does or has no rotary positions."""
    rotary = getattr(language_model, "rotary_pos_emb", None)
    if isinstance(rotary, MultimodalRotaryEmbedding) and not rotary.rotary_interleaved:
        rotary.register_forward_hook(_in_full_precision)
    return RotaryPositions(rotary) if isinstance(rotary, RotaryEmbedding) else None

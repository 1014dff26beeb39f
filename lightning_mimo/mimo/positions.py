"""Rotary positions that a sample gives, in place of 0, 1, 2, …."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding


class RotaryPositions:
    """Makes a RotaryEmbedding of megatron-core, which counts from 0, look at position ids.

    Attributes:
        positions: int64 ``[b, s]`` of the next forward pass; ``None`` to count from 0.
    """

    def __init__(self, rotary: RotaryEmbedding) -> None:
        """
        Args:
            rotary: of the language module; a forward hook is added to it.
        """
        self.positions: torch.Tensor | None = None
        rotary.register_forward_hook(self._replace)

    def _replace(self, rotary: RotaryEmbedding, args: tuple[Any, ...], angles: torch.Tensor) -> torch.Tensor | None:
        """``[s, 1, 1, dim] -> [s, b, 1, dim]``, by the same arithmetic."""
        if self.positions is None:
            return None
        frequencies = rotary.inv_freq
        positions = self.positions.t().to(device=frequencies.device, dtype=frequencies.dtype)
        if rotary.seq_len_interpolation_factor is not None:
            positions = positions * (1 / rotary.seq_len_interpolation_factor)
        half = positions.unsqueeze(-1) * frequencies
        both = torch.stack((half, half), dim=-1) if rotary.rotary_interleaved else torch.cat((half, half), dim=-1)
        return both.flatten(2).unsqueeze(2)


def follow_positions(language_model: torch.nn.Module) -> RotaryPositions | None:
    """Let a language module follow the positions of samples; ``None`` where it does so by itself or has none."""
    rotary = getattr(language_model, "rotary_pos_emb", None)
    return RotaryPositions(rotary) if isinstance(rotary, RotaryEmbedding) else None

"""Positions in time, height and width, as Qwen2-VL and Qwen2.5-VL give them to the tokens of a sample with images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightning_mimo.data.tensors import as_tensor
from lightning_mimo.errors import DataError


@dataclass(frozen=True, kw_only=True)
class GridPositions:
    """Makes the ``position_ids [3, S]`` of a sample from its tokens and the grids of its images.

    A text token has one position in all three rows: the largest so far, plus 1. The embeddings of an image all have
    that position in time; in height and width they count on from it, row by row.

    Example, for a text token, an image of 2 x 3 embeddings and two text tokens::

        time    0  1 1 1 1 1 1  4 5
        height  0  1 1 1 2 2 2  4 5
        width   0  1 2 3 1 2 3  4 5

    Attributes:
        module: of the images.
        encoder: of the module.
        argument: of the encoder: int64 ``[images, 3]``, patches of each image along time, height and width.
        token: the placeholder of one embedding.
        merge_size: patches that become one embedding, along height and along width.
    """

    module: str
    encoder: str
    argument: str
    token: int
    merge_size: int

    def __call__(self, index: int, input_ids: torch.Tensor, modality_inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """Positions int64 ``[3, S]``; ``None`` where the sample has no images.

        Args:
            index: of the sample, for messages.
            input_ids: int64 ``[S]``.
            modality_inputs: of the sample; only the grids are looked at.

        Raises:
            DataError: if there are no grids, they do not belong to the placeholders, or one is a video's.
        """
        tokens = input_ids.numpy()
        placeholders = np.flatnonzero(tokens == self.token)
        if placeholders.size == 0:
            return None
        grids = self._grids(index, modality_inputs)
        if (needed := int(grids.prod(axis=1).sum())) != placeholders.size:
            raise DataError(
                f"Sample {index}: input_ids has {placeholders.size} placeholder tokens for {self.module!r}, but "
                f"{self.argument} makes {needed} embeddings. Write {needed} placeholder tokens into this sample; if it "
                f"was cut to a length, cut it elsewhere."
            )
        positions = np.empty((3, tokens.size), np.int64)
        done = used = following = 0
        for _, height, width in grids.tolist():
            first, size = int(placeholders[used]), height * width
            if placeholders[used + size - 1] != first + size - 1:
                raise DataError(
                    f"Sample {index}: the {size} placeholder tokens of an image, from input_ids[{first}] on, have "
                    f"other tokens among them. They must stand side by side."
                )
            positions[:, done:first] = np.arange(following, following + first - done)
            following += first - done
            done, used = first + size, used + size
            positions[0, first:done] = following
            positions[1, first:done] = following + np.repeat(np.arange(height), width)
            positions[2, first:done] = following + np.tile(np.arange(width), height)
            following += max(height, width)
        positions[:, done:] = np.arange(following, following + tokens.size - done)
        return torch.from_numpy(positions)

    def _grids(self, index: int, modality_inputs: Mapping[str, Any]) -> np.ndarray:
        """Embeddings of each image along time (1), height and width, ``[images, 3]``."""
        value: Any = modality_inputs
        for key in (self.module, self.encoder, self.argument):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            raise DataError(
                f"Sample {index} has placeholders for {self.module!r}, but neither 'position_ids' nor "
                f"modality_inputs[{self.module!r}][{self.encoder!r}][{self.argument!r}], from which positions in time, "
                f"height and width are computed. Give one of them; a dataset with load(index, modules) must give it "
                f"also where {self.module!r} is not among the modules."
            )
        name = f"{self.module}.{self.encoder}.{self.argument}"
        grids = as_tensor(index, name, value).numpy()
        is_grid = grids.ndim == 2 and grids.shape[1] == 3 and grids.dtype.kind in "iu"
        if not is_grid or (grids < 1).any() or (grids[:, 1:] % self.merge_size).any():
            raise DataError(
                f"Sample {index}: {name} is {grids.tolist()}, but must be [images, 3]: patches along time, height and "
                f"width, the latter two multiples of {self.merge_size}, as the model's processor makes them."
            )
        if (grids[:, 0] != 1).any():
            raise DataError(
                f"Sample {index}: {name} has {grids[grids[:, 0] != 1][0].tolist()}, a video (time, height, width). How "
                f"far its frames are apart is not known here: give position_ids [3, S], as the model's get_rope_index "
                f"computes them."
            )
        return grids // [1, self.merge_size, self.merge_size]

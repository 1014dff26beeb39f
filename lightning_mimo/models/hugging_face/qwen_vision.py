"""The vision encoders of Qwen2-VL and Qwen2.5-VL, from transformers: patches of images of any size -> embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, override

import torch

from lightning_mimo.data.items import ItemSizes

_EXAMPLE_SIDE = 32
"""Embeddings along each side of an image in estimates without data; for Qwen2.5-VL it has 896 * 896 pixels."""


@dataclass(frozen=True, kw_only=True)
class VisionClasses:
    """Classes of transformers, and the names that they have for the same number.

    Attributes:
        path: of the Python module.
        tower: name of the vision model's class.
        merger: name of the class of the MLP that makes embeddings of features.
        width: field of the vision config: width inside of the layers.
        output_width: field of the vision config: width of an embedding.
    """

    path: str
    tower: str
    merger: str
    width: str
    output_width: str

    def build_tower(self, config: Any) -> torch.nn.Module:
        """The vision model of a vision config, with its merger."""
        return getattr(import_module(self.path), self.tower)._from_config(config)

    def build_merger(self, config: Any) -> torch.nn.Module:
        """The merger of a vision config."""
        return getattr(import_module(self.path), self.merger)(
            dim=getattr(config, self.output_width),
            context_dim=getattr(config, self.width),
            spatial_merge_size=config.spatial_merge_size,
        )


class _Concatenate(torch.nn.Module):
    """``[patches, width] -> [patches / number, number * width]``"""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.reshape(len(features) // self._number, -1)


class GridTower(torch.nn.Module):
    """A vision model of transformers without its merger: in its place, the features that are merged are concatenated.

    Attention is within an image, or within a window of it; no image sees another. Every rank holds all of the model.
    """

    def __init__(self, config: Any, classes: VisionClasses) -> None:
        super().__init__()
        self.tower = classes.build_tower(config)
        self.tower.merger = _Concatenate(config.spatial_merge_size**2)
        self.item_sizes = ItemSizes.of_grid(merge_size=config.spatial_merge_size)
        self._merge_size = config.spatial_merge_size
        channels = getattr(config, "in_channels", 3)
        self._patch_width = channels * config.temporal_patch_size * config.patch_size**2

    def example_inputs(self, items: int) -> tuple[dict[str, torch.Tensor], int]:
        """Black square images of 1,024 embeddings, and that number, for estimates without data."""
        side = _EXAMPLE_SIDE * self._merge_size
        inputs = {
            "pixel_values": torch.zeros(items * side**2, self._patch_width),
            "image_grid_thw": torch.tensor([[1, side, side]] * items),
        }
        return inputs, _EXAMPLE_SIDE**2

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Encode images.

        Args:
            pixel_values: ``[patches, d]`` of all images, in the order of the model's processor.
            image_grid_thw: int64 ``[images, 3]``, patches along time, height and width.

        Returns:
            ``[embeddings, merge_size**2 * width]``.
        """
        output = self.tower(pixel_values, grid_thw=image_grid_thw)
        return output if isinstance(output, torch.Tensor) else output.pooler_output  # the former in transformers 4

    @override
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> torch.nn.Module:
        """As of every module, but constants, the rotary frequencies, are moved and not rounded to another dtype."""
        constants = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in constants.items():
            path, _, last = name.rpartition(".")
            owner = self.get_submodule(path)
            setattr(owner, last, buffer.to(device=getattr(owner, last).device))
        return self


class GridMerger(torch.nn.Module):
    """What makes embeddings of the concatenated features: a norm of each, and an MLP over all of them."""

    def __init__(self, config: Any, classes: VisionClasses) -> None:
        super().__init__()
        self.merger = classes.build_merger(config)
        self._width = getattr(config, classes.width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``[embeddings, merge_size**2 * width] -> [embeddings, hidden]``"""
        return self.merger(features.reshape(-1, self._width))

"""Items of different sizes: images of other resolutions, clips of other lengths, and how an encoder declares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from lightning_mimo.errors import DataError
from lightning_mimo.microbatch import Ragged

Inputs = Mapping[str, torch.Tensor | Ragged]
"""The arguments of one encoder, argument -> its values."""
PerItem = Callable[[Inputs], Sequence[int] | torch.Tensor]
"""The arguments of one encoder in one sample -> one whole number for each item."""


@dataclass(frozen=True, kw_only=True)
class ItemSizes:
    """How the inputs of an encoder divide into items, and how many embeddings each item makes.

    An encoder declares it as its attribute ``item_sizes``, of the class or of the instance. It is needed where the
    first dimension of an argument does not count items, and where the encoder returns ``[rows, hidden]`` with other
    than one row for each item. The loader compares it with the placeholders of every sample before anything is run.

    Example, for patches as Qwen2.5-VL's processor makes them (:meth:`of_grid` is the same)::

        class Encoder(torch.nn.Module):
            item_sizes = ItemSizes(
                rows={"pixel_values": lambda inputs: inputs["image_grid_thw"].prod(dim=-1)},
                embeddings=lambda inputs: inputs["image_grid_thw"].prod(dim=-1) // 4,
            )

            def forward(self, pixel_values, image_grid_thw):  # [patches, d], [images, 3] -> [embeddings, hidden]

    Loader workers that are spawned, not forked, need functions that can be pickled.

    Attributes:
        embeddings: what the arguments of one sample come to: embeddings of each item, in the order of the items. Raises
            DataError, to whose message the sample is added, for inputs that the encoder does not take.
        rows: argument -> rows of each item in that argument. The first dimension of every other argument counts items.
        every_stage: integer arguments ``[items]`` or ``[items, n]`` that later pipeline stages of the encoder are given
            as well, as keyword arguments ``[items, n]`` beside ``hidden_states``.
        padded: arguments whose items are filled up with zeros, as processors make those of one call equally large. The
            samples of a microbatch may differ in all sizes of such an argument but the first; they are filled up, too,
            at the end of each dimension.
    """

    embeddings: PerItem
    rows: Mapping[str, PerItem] = field(default_factory=dict)
    every_stage: tuple[str, ...] = ()
    padded: tuple[str, ...] = ()

    @classmethod
    def of_grid(cls, values: str = "pixel_values", grid: str = "image_grid_thw", *, merge_size: int = 2) -> ItemSizes:
        """For patches ``[patches, d]`` with the grid of each image or video, int64 ``[items, 3]``: time, height, width.

        Args:
            values: the argument with the patches; an item has ``time * height * width`` of them.
            grid: the argument with the grids.
            merge_size: patches that become one embedding, along height and along width.
        """
        return cls(
            rows={values: partial(_rows_of_grid, grid)},
            embeddings=partial(_merged, grid, merge_size),
            every_stage=(grid,),
        )

    @classmethod
    def of_tiles(cls, values: str = "pixel_values", tiles: str = "num_tiles", *, embeddings_per_tile: int) -> ItemSizes:
        """For tiles ``[tiles, ...]`` with the number of tiles of each image, int64 ``[images]``.

        Args:
            values: the argument with the tiles.
            tiles: the argument with their numbers.
            embeddings_per_tile: embeddings that one tile makes.
        """
        return cls(
            rows={values: partial(_argument, tiles)},
            embeddings=partial(_multiplied, partial(_argument, tiles), embeddings_per_tile),
            every_stage=(tiles,),
        )


def _argument(name: str, inputs: Inputs) -> torch.Tensor:
    value = inputs[name]
    assert isinstance(value, torch.Tensor)
    return value


def _rows_of_grid(grid: str, inputs: Inputs) -> torch.Tensor:
    return _argument(grid, inputs).prod(dim=-1)


def _merged(grid: str, merge_size: int, inputs: Inputs) -> torch.Tensor:
    sizes = _argument(grid, inputs)
    if sizes.is_floating_point() or sizes.is_complex() or sizes.ndim != 2 or sizes.size(1) != 3:
        raise DataError(f"{grid} has the shape {list(sizes.shape)} and {sizes.dtype}, but must be int64 [items, 3].")
    if bool((sizes < 1).any()) or bool((sizes[:, 1:] % merge_size).any()):
        raise DataError(
            f"{grid} is {sizes.tolist()}, but time, height and width of an item are at least 1, and merge_size="
            f"{merge_size} must divide height and width."
        )
    return sizes.prod(dim=-1) // merge_size**2


def _multiplied(numbers: PerItem, factor: int, inputs: Inputs) -> torch.Tensor:
    return torch.as_tensor(numbers(inputs)) * factor

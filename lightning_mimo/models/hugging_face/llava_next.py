"""LLaVA-NeXT (LLaVA 1.6): images are cut into tiles, and have one more token at the end of each line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch.nn.functional import pad

from lightning_mimo.data.items import Inputs, ItemSizes
from lightning_mimo.errors import DataError
from lightning_mimo.models.hugging_face.config_values import refuse
from lightning_mimo.models.hugging_face.decoder import BuildOptions
from lightning_mimo.models.hugging_face.llava import LlavaModel
from lightning_mimo.models.hugging_face.vit import VitTower
from lightning_mimo.models.hugging_face.with_encoder import MULTI_MODAL_PROJECTOR
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.weights.rules import Rename, Rule, Source

VALUES, SIZES = "pixel_values", "image_sizes"
_END_OF_LINE = -1


@dataclass(frozen=True, kw_only=True)
class AnyResolution:
    """How an image of any size is cut into square tiles; the whole image, made small, is its first tile.

    Attributes:
        resolutions: height and width in pixels that an image may be brought to, multiples of ``tile_size``.
        tile_size: height and width of a tile in pixels.
        side: features of a tile along its height, and along its width.
    """

    resolutions: tuple[tuple[int, int], ...]
    tile_size: int
    side: int

    def grid(self, image: Sequence[int]) -> tuple[int, int]:
        """Tiles along height and width of an image of some height and width in pixels, its first tile not counted."""
        from transformers.image_processing_utils import select_best_resolution

        height, width = select_best_resolution(tuple(image), list(self.resolutions))
        return height // self.tile_size, width // self.tile_size

    def tiles(self, image: Sequence[int]) -> int:
        """Tiles of an image."""
        height, width = self.grid(image)
        return 1 + height * width

    def rows(self, image: Sequence[int]) -> torch.Tensor:
        """For each embedding of an image its row in ``[tiles * side * side]`` features, int64; -1 at ends of lines.

        Features of the margins that fill up the resolution are left out.
        """
        from transformers.models.llava_next.modeling_llava_next import unpad_image

        (height, width), side = self.grid(image), self.side
        rows = torch.arange((1 + height * width) * side**2)
        lines = rows[side**2 :].view(height, width, side, side).transpose(1, 2)
        lines = unpad_image(lines.reshape(1, height * side, width * side), tuple(image))[0]
        return torch.cat([rows[: side**2], pad(lines, (0, 1), value=_END_OF_LINE).flatten()])

    def embeddings(self, inputs: Inputs) -> list[int]:
        """Of each image of a sample."""
        sizes = inputs[SIZES]
        assert isinstance(sizes, torch.Tensor)
        return [len(self.rows(image)) for image in sizes.tolist()]

    @property
    def item_sizes(self) -> ItemSizes:
        """What a sample must have."""
        return ItemSizes(embeddings=self.embeddings, padded=(VALUES,), every_stage=(SIZES,))

    def cut(self, pixel_values: torch.Tensor, images: Sequence[Sequence[int]]) -> torch.Tensor:
        """All tiles that count, ``[tiles, channels, tile_size, tile_size]``, of images filled up to the largest.

        Args:
            pixel_values: ``[n, tiles, channels, tile_size, tile_size]``.
            images: their heights and widths in pixels.

        Raises:
            DataError: if an image has fewer tiles than its size comes to.
        """
        numbers = [self.tiles(image) for image in images]
        for image, number in zip(images, numbers, strict=True):
            if pixel_values.ndim != 5 or pixel_values.size(1) < number:
                raise DataError(
                    f"pixel_values has the shape {tuple(pixel_values.shape)}, but an image of {image[0]} * {image[1]} "
                    f"pixels has {number} tiles by image_grid_pinpoints in config.json, so that it must be [images, "
                    f"{number} or more, channels, height, width]. Use the image processor of the model's folder."
                )
        return torch.cat([tiles[:number] for tiles, number in zip(pixel_values, numbers, strict=True)])

    def in_lines(self, features: torch.Tensor, images: Sequence[Sequence[int]]) -> torch.Tensor:
        """``[rows, width + 1]``, for each embedding its feature and a 0, or zeros and a 1 for the end of a line.

        Args:
            features: ``[tiles, side * side, width]`` of the tiles that count.
            images: heights and widths in pixels.

        Raises:
            DataError: if a tile has another number of features.
        """
        if features.size(1) != self.side**2:
            raise DataError(
                f"The vision encoder makes {features.size(1)} features of a tile, but lines of images need "
                f"{self.side} * {self.side}. Set vision_feature_select_strategy in config.json to 'default' for an "
                f"encoder with a class token, to 'full' for one without."
            )
        features = features.flatten(0, 1)
        order, first, end = [], 0, len(features)
        for image in images:
            rows = self.rows(image)
            order.append(torch.where(rows == _END_OF_LINE, end, rows + first))
            first += self.tiles(image) * self.side**2
        line_end = pad(features.new_zeros(1, features.size(1)), (0, 1), value=1.0)
        return torch.cat([pad(features, (0, 1)), line_end]).index_select(0, torch.cat(order).to(features.device))


class TileEncoder(torch.nn.Module):
    """A vision encoder over the tiles of images; what it returns says where lines end, for :class:`LineProjector`."""

    def __init__(self, tower: ModuleSpec, images: AnyResolution, pg_collection: ProcessGroupCollection) -> None:
        """
        Args:
            tower: encoder of tiles.
            images: how they are cut into tiles.
            pg_collection: the module's process groups; one pipeline stage of several may be built.
        """
        super().__init__()
        self.tower = build_module(tower)
        self.images = images
        self.item_sizes = images.item_sizes
        self._last = pg_collection.pp.rank() == pg_collection.pp.size() - 1

    def forward(
        self,
        image_sizes: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode images, or continue from the stage before.

        Args:
            image_sizes: int64 ``[n, 2]``, height and width of the images in pixels.
            pixel_values: ``[n, tiles, channels, tile_size, tile_size]`` on the first stage; an image may have more
                tiles than it needs.
            hidden_states: from the stage before, on later stages.

        Returns:
            ``[rows, width + 1]`` on the last stage; the last column is 1 at ends of lines, where the others are 0.

        Raises:
            DataError: for images with fewer tiles than their sizes come to.
        """
        images = image_sizes.tolist()
        if pixel_values is not None:
            output = self.tower(self.images.cut(pixel_values, images))
        else:
            output = self.tower(hidden_states=hidden_states)
        return self.images.in_lines(output, images) if self._last else output


class LineProjector(torch.nn.Module):
    """Projects features, and puts one learned embedding at the ends of lines."""

    def __init__(self, features: ModuleSpec) -> None:
        """
        Args:
            features: their MultimodalProjector.
        """
        super().__init__()
        self.features = build_module(features)
        config = self.features.config
        embedding = torch.empty(config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.end_of_line = torch.nn.Parameter(embedding)
        torch.nn.init.normal_(self.end_of_line, std=config.hidden_size**-0.5)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``[rows, width + 1]``, as a :class:`TileEncoder` returns it, ``-> [rows, hidden]``"""
        return torch.where(rows[:, -1:] > 0, self.end_of_line, self.features(rows[:, :-1]))


class LlavaNextModel(LlavaModel):
    """Modules ``images`` and ``language``."""

    tower_path = "tower."
    projector_path = "features."

    def __init__(self, config: Any, model_of: Callable[[Any], Any]) -> None:
        """
        Args:
            config: a LlavaNextConfig of transformers.
            model_of: the model of a config, for its text.

        Raises:
            ConfigError: for what this package's model cannot follow.
        """
        super().__init__(config, model_of)
        vision = config.vision_config
        self.images = AnyResolution(
            resolutions=tuple((height, width) for height, width in config.image_grid_pinpoints),
            tile_size=vision.image_size,
            side=vision.image_size // vision.patch_size,
        )
        if uneven := [each for each in self.images.resolutions if any(size % vision.image_size for size in each)]:
            raise refuse(
                config,
                f"{list(uneven[0])} in image_grid_pinpoints with tiles of vision_config.image_size={vision.image_size}",
                "Heights and widths must be multiples of it.",
            )
        if isinstance(self.tower, VitTower) and self.tower.tokens != self.images.side**2:
            raise refuse(
                config,
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with "
                f"vision_config.model_type={vision.model_type!r}",
                "Set 'default' for an encoder with a class token, 'full' for one without.",
            )

    def encoder_spec(self, infra: MimoModelInfra, options: BuildOptions) -> ModuleSpec:
        params = {
            "tower": super().encoder_spec(infra, options),
            "images": self.images,
            "pg_collection": infra.pg_collections.get(self.module),
        }
        return ModuleSpec(module=TileEncoder, params=params)

    def projector_spec(self, infra: MimoModelInfra) -> ModuleSpec:
        return ModuleSpec(module=LineProjector, params={"features": super().projector_spec(infra)})

    def projector_rules(self, prefix: str) -> list[Rule]:
        # It lies beside the projector in the files: "image_newline" or "model.image_newline".
        name = prefix.removesuffix(MULTI_MODAL_PROJECTOR) + "image_newline"
        newline = Source(name=name, shape=(self.text.size.hidden_size,))
        return [*super().projector_rules(prefix), Rename(f"{self.projector_prefix}end_of_line", newline)]

"""Idefics3 and SmolVLM: tiles of one size, whose neighboring features are put side by side, and one linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from lightning_mimo.data.items import Inputs, ItemSizes
from lightning_mimo.errors import DataError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.models.hugging_face.clip import siglip_tower_with_norm
from lightning_mimo.models.hugging_face.config_values import refuse
from lightning_mimo.models.hugging_face.decoder import BuildOptions
from lightning_mimo.models.hugging_face.with_encoder import LINEAR, ModelWithEncoder
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.weights.rules import Rename, RuleTable, Source

VALUES, MASK = "pixel_values", "pixel_attention_mask"
_TOWER, _CONNECTOR = "model.vision_model.", "model.connector.modality_projection.proj.weight"


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles of the images of a text, filled up to the tiles of other texts.

    Attributes:
        size: height and width of a tile in pixels.
        side: features of a tile along its height, and along its width.
        shuffled: features along height, and along width, that become one embedding.
    """

    size: int
    side: int
    shuffled: int

    @property
    def embeddings_per_tile(self) -> int:
        return (self.side // self.shuffled) ** 2

    @property
    def item_sizes(self) -> ItemSizes:
        """What a sample must have: an item is a row of tiles, as the processor makes one of each text."""
        return ItemSizes(embeddings=self.embeddings, padded=(VALUES, MASK))

    def embeddings(self, inputs: Inputs) -> torch.Tensor:
        """Of each row of tiles, ``[n]``.

        Raises:
            DataError: for tiles of another size, or that are filled up inside.
        """
        values, mask = inputs[VALUES], inputs[MASK]
        assert isinstance(values, torch.Tensor)
        assert isinstance(mask, torch.Tensor)
        size = (self.size, self.size)
        if values.ndim != 5 or values.shape[-2:] != size or mask.shape != (*values.shape[:2], *size):
            raise DataError(
                f"{VALUES} has the shape {list(values.shape)} and {MASK} {list(mask.shape)}, but this encoder takes "
                f"[n, tiles, channels, {self.size}, {self.size}] and [n, tiles, {self.size}, {self.size}]. Use the "
                f"image processor of the model's folder."
            )
        pixels = (mask != 0).sum(dim=(-1, -2))
        if bool(((pixels != 0) & (pixels != self.size**2)).any()):
            raise DataError(
                f"{MASK} leaves out a part of a tile, but this encoder takes tiles that are whole, as the image "
                f"processor of the model's folder makes them. Resize images to multiples of {self.size} pixels."
            )
        return (pixels != 0).sum(dim=-1) * self.embeddings_per_tile

    def shuffle(self, features: torch.Tensor) -> torch.Tensor:
        """Put neighboring features side by side.

        Args:
            features: ``[tiles, side * side, width]``.

        Returns:
            ``[tiles * embeddings_per_tile, shuffled * shuffled * width]``.
        """
        step, blocks = self.shuffled, self.side // self.shuffled
        tiles, _, width = features.shape
        grid = features.reshape(tiles, blocks, step, blocks, step, width).transpose(2, 3)
        return grid.reshape(tiles * blocks**2, step**2 * width)


class TilesEncoder(torch.nn.Module):
    """A vision encoder over tiles, whose features are shuffled.

    Each patch has a position of its own, as in transformers 5; version 4.56 gives some that of the patch before.
    """

    def __init__(self, tower: ModuleSpec, tiles: Tiles, pg_collection: ProcessGroupCollection) -> None:
        """
        Args:
            tower: encoder of tiles.
            tiles: their sizes.
            pg_collection: the module's process groups; one pipeline stage of several may be built.
        """
        super().__init__()
        self.tower = build_module(tower)
        self.tiles = tiles
        self.item_sizes = tiles.item_sizes
        self._last = pg_collection.pp.rank() == pg_collection.pp.size() - 1

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode tiles, or continue from the stage before.

        Args:
            pixel_values: ``[n, tiles, channels, size, size]``, on the first stage.
            pixel_attention_mask: ``[n, tiles, size, size]``, 0 in tiles that do not count, on the first stage.
            hidden_states: from the stage before, on later stages.

        Returns:
            ``[embeddings, shuffled * shuffled * width]`` on the last stage.
        """
        if pixel_values is not None:
            assert pixel_attention_mask is not None, "the loader has compared them"
            counts = pixel_attention_mask.flatten(0, 1)[:, 0, 0] != 0
            output = self.tower(pixel_values.flatten(0, 1)[counts])
        else:
            output = self.tower(hidden_states=hidden_states)
        return self.tiles.shuffle(output) if self._last else output


class Idefics3Model(ModelWithEncoder):
    """Modules ``images`` and ``language``."""

    text_names = (("model.text_model.", "lm_head.weight"),)

    def __init__(self, config: Any, model_of: Callable[[Any], Any]) -> None:
        """
        Args:
            config: an Idefics3Config or SmolVLMConfig of transformers.
            model_of: the model of a config, for its text.

        Raises:
            ConfigError: for what this package's model cannot follow.
        """
        super().__init__(config, model_of, placeholder=("image_token_id",))
        vision = config.vision_config
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(vision, name), int):
                raise refuse(vision, f"{name}={getattr(vision, name)}", "Supported: squares, given by one number.")
        self.tiles = Tiles(
            size=vision.image_size, side=vision.image_size // vision.patch_size, shuffled=config.scale_factor
        )
        if self.tiles.side % self.tiles.shuffled:
            raise refuse(
                config,
                f"scale_factor={config.scale_factor} with {vision.image_size} / {vision.patch_size} = "
                f"{self.tiles.side} patches along an edge",
                "It must divide them.",
            )
        self.tower = siglip_tower_with_norm(vision)

    def check_encoder(self, layout: MimoLayout) -> None:
        self.tower.check(layout, self.module)

    def encoder_spec(self, infra: MimoModelInfra, options: BuildOptions) -> ModuleSpec:
        params = {
            "tower": self.tower.encoder_spec(infra, self.module, options),
            "tiles": self.tiles,
            "pg_collection": infra.pg_collections.get(self.module),
        }
        return ModuleSpec(module=TilesEncoder, params=params)

    def projector_spec(self, infra: MimoModelInfra) -> ModuleSpec:
        return ModuleSpec(
            module=MultimodalProjector,
            params={
                "config": self.projector_config(infra, bias=False),
                "submodules": LINEAR,
                "projector_type": "affine",
                "input_size": self._shuffled_width,
                "pg_collection": infra.pg_collections.get(self.module),
            },
        )

    @property
    def _shuffled_width(self) -> int:
        return self.tower.width * self.tiles.shuffled**2

    def rules(self, shapes: Mapping[str, Sequence[int]], padded_vocab_size: int) -> RuleTable:
        rules, kept = self.language_rules(shapes, padded_vocab_size)
        rules += self.tower.rules(f"{self.encoder_prefix}tower.", _TOWER, shapes)
        connector = Source(name=_CONNECTOR, shape=(self.text.size.hidden_size, self._shuffled_width))
        rules.append(Rename(f"{self.projector_prefix}encoder.weight", connector))
        return RuleTable(rules, kept=[*kept, *self.tower.kept(_TOWER)])

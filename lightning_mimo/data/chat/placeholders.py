"""How many placeholders an image becomes, from its size alone, where the processor says so."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_mimo.data.chat.media import Size
from lightning_mimo.errors import ConfigError

GRID = "image_grid_thw"
"""Argument that a language module needs, too: positions in height and width are made from it."""

# Of one shape or another, larger and smaller than what a processor makes of them.
_TRIALS = (Size(64, 48), Size(40, 130), Size(450, 300))

Expand = Callable[[Sequence[int]], list[int]]
"""Tokens of a text with one image that becomes so many placeholders."""


class ImagePlaceholders:
    """Placeholders, and the grid of patches, of an image of some size.

    What transformers says of a processor is compared with what the processor makes of a few blank images, token for
    token. If it differs, or nothing is said, and these images all become the same number, that is the number. Else
    images have to be decoded to know.

    Attributes:
        is_known: whether sizes tell.
        fixed: placeholders of an image of any size; ``None`` if they depend on the size, or are not known.
    """

    def __init__(self, processor: Any, expand: Expand, text: str) -> None:
        """
        Args:
            processor: of transformers, with an image processor.
            expand: gives the tokens of ``text``.
            text: has one image.
        """
        self._processor = processor
        self._made: dict[Size, int] = {}
        self._count: Callable[[Size], int] | None = None
        self.fixed: int | None = None
        self._has_grid = False
        self._find(expand, text)

    @property
    def is_known(self) -> bool:
        return self._count is not None

    def number(self, size: Size) -> int:
        """Placeholders of an image.

        Raises:
            Exception: whatever the processor raises for a size that it does not take.
        """
        assert self._count is not None, "is_known says so"
        if size not in self._made:
            self._made[size] = self._count(size)
        return self._made[size]

    def arguments(self, sizes: Sequence[Size]) -> dict[str, torch.Tensor]:
        """What is known of the encoder's arguments: ``image_grid_thw`` int64 ``[images, 3]`` or nothing."""
        return {GRID: torch.tensor([self._grid(size) for size in sizes])} if self._has_grid and sizes else {}

    def _find(self, expand: Expand, text: str) -> None:
        try:
            outputs = [self._process(size, text) for size in _TRIALS]
        except Exception:  # of a processor of whatever kind, which takes such images in another way
            return
        tokens = [output["input_ids"][0].tolist() for output in outputs]
        self._has_grid = GRID in outputs[0]
        fixed = len(tokens[0]) - len(expand([1])) + 1
        for count in (self._told, lambda size: fixed):
            if self._agrees(count, expand, tokens, outputs):
                self._count = count
                self.fixed = fixed if len({len(made) for made in tokens}) == 1 else None
                return

    def _agrees(
        self, count: Callable[[Size], int], expand: Expand, tokens: Sequence[list[int]], outputs: Sequence[Any]
    ) -> bool:
        try:
            return all(
                expand([count(size)]) == made and (not self._has_grid or output[GRID].tolist() == [self._grid(size)])
                for size, made, output in zip(_TRIALS, tokens, outputs, strict=True)
            )
        except Exception:  # the processor's own, where it was not made for the question
            return False

    def _process(self, size: Size, text: str) -> Any:
        from PIL import Image

        blank = Image.new("RGB", (size.width, size.height))
        return self._processor(text=[text], images=[[blank]], return_tensors="pt")

    def _told(self, size: Size) -> int:
        (number,) = self._processor._get_num_multimodal_tokens(image_sizes=[tuple(size)])["num_image_tokens"]
        return number

    def _grid(self, size: Size) -> list[int]:
        """As Qwen2-VL's image processor divides an image."""
        module = importlib.import_module("transformers.models.qwen2_vl.image_processing_qwen2_vl")
        images = self._processor.image_processor
        height, width = module.smart_resize(
            size.height,
            size.width,
            factor=images.patch_size * images.merge_size,
            min_pixels=images.size["shortest_edge"],
            max_pixels=images.size["longest_edge"],
        )
        return [1, height // images.patch_size, width // images.patch_size]


def token_of(processor: Any, kind: str) -> tuple[str, int] | None:
    """The placeholder of images, videos or sounds, and its id; ``None`` if the processor has none.

    Raises:
        ConfigError: if its tokenizer does not know it as one token.
    """
    token = getattr(processor, f"{kind}_token", None)
    if token is None:
        return None
    token = str(token)
    ids = processor.tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise ConfigError(
            f"The placeholder {token!r} of the {type(processor).__name__} is {len(ids)} tokens for its tokenizer, but "
            f"must be one. Add it: processor.tokenizer.add_special_tokens."
        )
    return token, ids[0]

"""Damaged samples: keys, dtypes, shapes, lengths and values that a dataset may get wrong."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

IMAGE, WIDTH, VOCABULARY, LONGEST = 30, 5, 32, 12
Expected = Literal["refused", "equal", "valid"]
"""``refused``; or accepted, with the batch of the undamaged sample (``equal``) or with another one (``valid``)."""


def sample(index: int) -> dict[str, Any]:
    """A sample with one image of 2 x 4 patches, which are 2 placeholders, and 6 further tokens."""
    generator = torch.Generator().manual_seed(index)
    text = torch.randint(2, IMAGE, (6,), generator=generator)
    ids = torch.cat([torch.tensor([1, IMAGE, IMAGE]), text[:5]])
    return {
        "input_ids": ids,
        "labels": torch.cat([torch.tensor([-100, -100, text[0]]), text[1:]]),
        "loss_mask": torch.tensor([0, 0, 1, 1, 1, 0, 1, 0.5]),
        "modality_inputs": {
            "images": {
                "vit": {
                    "pixel_values": torch.rand(8, WIDTH, generator=generator),
                    "image_grid_thw": torch.tensor([[1, 2, 4]]),
                }
            }
        },
    }


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One way to damage a sample.

    Attributes:
        what: its name.
        expected: what is to become of the sample.
        apply: changes a sample, or returns what takes its place.
    """

    what: str
    expected: Expected
    apply: Callable[[dict[str, Any]], Any]


def _set(key: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    """Replace the value of a key, ``a/b`` for nested ones, by a function of it."""

    def apply(content: dict[str, Any]) -> None:
        *outer, last = key.split("/")
        for each in outer:
            content = content[each]
        content[last] = change(content.get(last))

    return apply


def _drop(key: str) -> Callable[[dict[str, Any]], Any]:
    def apply(content: dict[str, Any]) -> None:
        *outer, last = key.split("/")
        for each in outer:
            content = content[each]
        content.pop(last, None)

    return apply


def _with(position: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[position] = value
        return tensor

    return change


VIT = "modality_inputs/images/vit"
PIXELS, GRID = f"{VIT}/pixel_values", f"{VIT}/image_grid_thw"
_NOT_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "words": lambda value: ["a", "b"],
    "a word": lambda value: "a b",
    "a ragged list": lambda value: [[1], [1, 2]],
    "objects": lambda value: np.array([{}, {}]),
    "a dictionary": lambda value: {"a": value},
}
_WHOLE = ("input_ids", "labels")


def _damages() -> Iterator[Damage]:
    refused = [
        *((f"no {key}", _drop(key)) for key in (*_WHOLE, "modality_inputs", PIXELS, GRID)),
        *(
            (f"{key} is {what}", _set(key, how))
            for key in (*_WHOLE, PIXELS, GRID)
            for what, how in _NOT_NUMBERS.items()
        ),
        *((f"loss_mask is {what}", _set("loss_mask", how)) for what, how in _NOT_NUMBERS.items()),
        *((f"{key} is float", _set(key, lambda value: value.float())) for key in _WHOLE),
        *((f"{key} is boolean", _set(key, lambda value: value > 1)) for key in _WHOLE),
        *((f"{key} is complex", _set(key, lambda value: value.to(torch.complex64))) for key in (*_WHOLE, GRID)),
        *((f"{key} has a batch dimension", _set(key, lambda value: value[None])) for key in (*_WHOLE, "loss_mask")),
        *((f"{key} is a number", _set(key, lambda value: value[0])) for key in (*_WHOLE, "loss_mask")),
        *((f"{key} is shorter", _set(key, lambda value: value[:-1])) for key in (*_WHOLE, "loss_mask")),
        *(
            (f"{key} is longer", _set(key, lambda value: torch.cat([value, value[-1:]])))
            for key in (*_WHOLE, "loss_mask")
        ),
        *((f"{key} has a token beyond", _set(key, _with(4, VOCABULARY))) for key in _WHOLE),
        *((f"{key} has a negative token", _set(key, _with(4, -7))) for key in _WHOLE),
        ("input_ids is None", _set("input_ids", lambda value: None)),
        ("input_ids is empty", _set("input_ids", lambda value: value[:0])),
        ("labels are unsigned", _set("labels", lambda value: value.to(torch.uint8))),
        ("labels are the tokens", lambda content: content.update(labels=content["input_ids"].clone())),
        *((f"loss_mask has {each}", _set("loss_mask", _with(2, each))) for each in (-1.0, float("nan"), float("inf"))),
        ("attention_mask with a gap", _set("attention_mask", lambda _: [1, 1, 0, 1, 1, 1, 1, 1])),
        ("attention_mask of zeros", _set("attention_mask", lambda _: [0] * 8)),
        ("attention_mask on the left", _set("attention_mask", lambda _: [0, 1, 1, 1, 1, 1, 1, 1])),
        ("attention_mask is shorter", _set("attention_mask", lambda _: [1] * 7)),
        ("position_ids is negative", _set("position_ids", lambda _: [-1, 1, 2, 3, 4, 5, 6, 7])),
        ("position_ids is shorter", _set("position_ids", lambda _: [0, 1, 2])),
        ("position_ids is float", _set("position_ids", lambda _: torch.arange(8.0))),
        ("position_ids of two dimensions", _set("position_ids", lambda _: torch.zeros(2, 8, dtype=torch.int64))),
        ("one placeholder more", _set("input_ids", _with(4, IMAGE))),
        ("one placeholder fewer", _set("input_ids", _with(2, 5))),
        ("one patch more", _set(PIXELS, lambda value: torch.cat([value, value[:1]]))),
        ("one patch fewer", _set(PIXELS, lambda value: value[:-1])),
        ("pixel_values is a number", _set(PIXELS, lambda value: value[0, 0])),
        ("pixel_values is None", _set(PIXELS, lambda value: None)),
        ("pixels of another width", _set(PIXELS, lambda value: value[:, :-1])),
        ("an image too many in the grid", _set(GRID, lambda value: torch.cat([value, value]))),
        ("grid of another size", _set(GRID, lambda value: torch.tensor([[1, 2, 2]]))),
        ("grid of zeros", _set(GRID, lambda value: value * 0)),
        ("negative grid", _set(GRID, lambda value: -value)),
        ("grid that does not merge", _set(GRID, lambda value: torch.tensor([[1, 1, 8]]))),
        ("grid of two numbers", _set(GRID, lambda value: value[:, :2])),
        ("grid is float", _set(GRID, lambda value: value + 0.5)),
        ("unknown key", _set("pixel_values", lambda _: torch.ones(2))),
        ("unknown module", _set("modality_inputs/audio", lambda _: {"clip": {"frames": torch.ones(2)}})),
        ("modality_inputs is a list", _set("modality_inputs", lambda value: [value])),
        ("a module is None", _set("modality_inputs/images", lambda value: None)),
        ("an encoder is a tensor", _set(VIT, lambda value: torch.ones(2))),
        *((f"a sample is {each!r}", lambda content, each=each: each) for each in (None, 3, "text", [1, 2], b"bytes")),
    ]
    for what, apply in refused:
        yield Damage(what=what, expected="refused", apply=apply)
    for key in _WHOLE:
        for what, how in {
            "int32": lambda value: value.to(torch.int32),
            "int16": lambda value: value.to(torch.int16),
            "an array": lambda value: value.numpy(),
            "a read-only array": lambda value: np.frombuffer(value.numpy().tobytes(), dtype=np.int64),
            "a list": lambda value: value.tolist(),
            "a view": lambda value: torch.stack([value, value], 1)[:, 0],
        }.items():
            yield Damage(what=f"{key} is {what}", expected="equal", apply=_set(key, how))
    yield Damage(what="attention_mask of ones", expected="equal", apply=_set("attention_mask", lambda _: [1] * 8))
    yield Damage(what="loss_mask is a list", expected="valid", apply=_set("loss_mask", lambda value: value.tolist()))
    yield Damage(what="grid is a list", expected="equal", apply=_set(GRID, lambda value: value.tolist()))
    yield Damage(what="position_ids", expected="equal", apply=_set("position_ids", lambda _: list(range(8))))
    yield Damage(what="padding", expected="valid", apply=_set("attention_mask", lambda _: [1, 1, 1, 1, 1, 1, 0, 0]))
    yield Damage(what="no loss_mask", expected="valid", apply=_drop("loss_mask"))


DAMAGES = tuple(_damages())


_WORDS = {
    "input_ids": "placeholder",
    "attention_mask": "padding",
    "pixel_values": "p(atch|ixels)",
    "image_grid_thw": "grid",
}


def _key(damage: Damage) -> str | None:
    """The key that a damage changes; ``None`` for one of the whole sample."""
    keys = ("image_grid_thw", "pixel_values", "labels", "loss_mask", "position_ids", "input_ids", "attention_mask")
    found = next((key for key in keys if key in damage.what), None)
    return found or next((key for key, word in _WORDS.items() if re.search(word, damage.what)), None)


def damaged_samples(seed: int, number: int) -> Iterator[tuple[str, Expected, list[Any]]]:
    """Yield what was done, what is expected, and three samples of which one is damaged, in one or two ways."""
    draw = random.Random(seed)
    for i in range(number):
        damages = [DAMAGES[i]] if i < len(DAMAGES) else draw.sample(DAMAGES, 2)
        if len({_key(each) for each in damages}) < len(damages) or None in map(_key, damages):
            damages = damages[:1]  # two on the same key may cancel out
        samples: list[Any] = [sample(3 * i + k) for k in range(3)]
        place = draw.randrange(3)
        expected = min((each.expected for each in damages), key=("refused", "valid", "equal").index)
        for each in damages:
            try:
                replaced = each.apply(samples[place])
            except (TypeError, AttributeError, KeyError, IndexError, RuntimeError, ValueError):
                continue  # the first damage has left nothing for the second one
            samples[place] = replaced if each.what.startswith("a sample is") else samples[place]
        yield " and ".join(each.what for each in damages), expected, samples

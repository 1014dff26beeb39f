"""Sizes from the first bytes of files are those that Pillow finds, and files that may be turned are left to it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from lightning_mimo.data.chat.headers import Size, plain_size


def saved(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((37, 21), 60).convert(mode).save(file, kind, **options)
    return file.getvalue()


def orientation() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def with_text() -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    return text


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"comment": b"\xff\xc0" * 40}, {"icc_profile": b"\xff\xd8" * 40_000}, {"dpi": (9, 9)}],
    ids=["baseline", "progressive", "comment", "icc", "dpi"],
)
def test_size_of_a_jpeg(mode: str, options: dict[str, Any]) -> None:
    assert plain_size(io.BytesIO(saved("jpeg", mode, **options))) == Size(height=21, width=37)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_size_of_a_png(mode: str) -> None:
    assert plain_size(io.BytesIO(saved("png", mode))) == Size(height=21, width=37)
    assert plain_size(io.BytesIO(saved("png", mode, dpi=(9, 9)))) == Size(height=21, width=37)


@pytest.mark.parametrize(
    "content",
    [
        saved("jpeg", exif=orientation()),
        saved("jpeg", xmp=b'<x tiff:Orientation="6"/>'),
        saved("png", exif=orientation()),
        saved("png", pnginfo=with_text()),
        saved("gif"),
        saved("webp"),
        b"",
        b"no image at all, but long enough to be one",
    ],
    ids=["exif", "xmp", "exif of png", "text of png", "gif", "webp", "empty", "text"],
)
def test_what_may_be_turned_or_is_of_another_kind_is_left_to_pillow(content: bytes) -> None:
    assert plain_size(io.BytesIO(content)) is None


def test_a_file_that_is_cut_off_has_its_size_or_none() -> None:
    for whole in (saved("jpeg"), saved("png")):
        found = {plain_size(io.BytesIO(whole[:length])) for length in range(len(whole))}
        assert found == {None, Size(height=21, width=37)}


def test_an_image_of_no_height_is_left_to_pillow() -> None:
    whole = saved("png")
    assert plain_size(io.BytesIO(whole[:20] + bytes(4) + whole[24:])) is None

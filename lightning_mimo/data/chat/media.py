"""Images, videos and sounds of a row: their sizes from the header of the file, or all of them."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_mimo.data.chat.conversation import Conversation, Media
from lightning_mimo.data.chat.headers import Size, plain_size
from lightning_mimo.data.packages import require
from lightning_mimo.errors import DataError, MimoError

_ORIENTATION = 0x0112  # of EXIF
_TURNED = (5, 6, 7, 8)  # by a quarter, so that height and width change places
_VIDEO_FILES = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".gif")


class Sound(NamedTuple):
    """A sound: float32 ``[samples]``, of so many samples a second."""

    samples: np.ndarray
    sampling_rate: int


def image_size(conversation: Conversation, media: Media) -> Size:
    """Size of an image, upright, from the header of its file.

    Raises:
        DataError: if it cannot be read, naming the row and the field.
    """
    with _naming(conversation, media):
        if (size := _plain_size(conversation, media)) is not None:
            return size
        with _opened(conversation, media, media.source) as image:
            return _upright_size(image)


def load_image(conversation: Conversation, media: Media) -> Any:
    """An image as a ``PIL.Image.Image`` of RGB, upright.

    Raises:
        DataError: if it cannot be read, naming the row and the field.
    """
    with _naming(conversation, media):
        return _load_image(conversation, media, media.source)


def load_video(conversation: Conversation, media: Media) -> list[Any]:
    """A video, given as a list of frames, each an image.

    Raises:
        DataError: if it is not given as frames, or one cannot be read.
    """
    if not isinstance(media.source, list | tuple) or not media.source:
        given = f"the file {media.source}" if str(media.source).endswith(_VIDEO_FILES) else type(media.source).__name__
        raise conversation.error(
            media.field, f"is {given}, but a video is given as a list of its frames: paths of images, in order."
        )
    with _naming(conversation, media):
        return [_load_image(conversation, media, frame) for frame in media.source]


def load_sound(conversation: Conversation, media: Media, sampling_rate: int) -> Sound:
    """A sound of one channel. Several channels are averaged.

    Raises:
        DataError: if it cannot be read, or has another sampling rate.
    """
    with _naming(conversation, media):
        sound = _load_sound(conversation, media)
    if sound.sampling_rate != sampling_rate:
        raise conversation.error(
            media.field,
            f"has {sound.sampling_rate} samples a second, but the processor takes {sampling_rate}. Resample the file.",
        )
    return sound


def _load_image(conversation: Conversation, media: Media, source: Any) -> Any:
    from transformers.image_utils import load_image as upright_rgb

    with _opened(conversation, media, source) as image:
        expected = _upright_size(image)
        loaded = upright_rgb(image)
    if (found := Size(loaded.height, loaded.width)) != expected:
        raise conversation.error(
            media.field,
            f"is {found.height} * {found.width} pixels, but {expected.height} * {expected.width} by its header: the "
            f"file says at its end that it is to be turned. Save it again, turned.",
        )
    return loaded


def _plain_size(conversation: Conversation, media: Media) -> Size | None:
    """Size of an image whose file need not be looked into further, nor opened by Pillow."""
    if not isinstance(media.source, str | bytes | Path | Mapping):
        return None
    found = _file_of(conversation, media, media.source)
    with io.FileIO(found) if isinstance(found, str) else found as file:
        return plain_size(file)


def _upright_size(image: Any) -> Size:
    from PIL import Image

    # The method of the base class: that of PNG decodes all of the file to look for what may stand at its end.
    is_turned = Image.Image.getexif(image).get(_ORIENTATION) in _TURNED
    return Size(image.width, image.height) if is_turned else Size(image.height, image.width)


@contextmanager
def _opened(conversation: Conversation, media: Media, source: Any) -> Iterator[Any]:
    """A ``PIL.Image.Image`` of which the header alone has been read, unless it was given as one."""
    pil = require("PIL.Image", what="Reading images", install="lightning-mimo[hf]")
    if isinstance(source, pil.Image):
        yield source
        return
    with pil.open(_file_of(conversation, media, source)) as image:
        yield image


def _file_of(conversation: Conversation, media: Media, source: Any) -> str | io.BytesIO | io.BufferedReader:
    """What a path, bytes, or a dict of the two as ``datasets`` has it, stand for."""
    if isinstance(source, Mapping) and ("bytes" in source or "path" in source):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, Path):
        return str(conversation.folder / source)
    if not isinstance(source, str):
        raise conversation.error(
            media.field, f"is a {type(source).__name__}, but must be a path, bytes, or what Pillow has opened."
        )
    if conversation.files is not None and (field := conversation.files.field_of(source)) is not None:
        return conversation.files.open(field)
    if source.startswith("data:"):
        return io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
    if source.startswith(("http://", "https://", "s3://", "gs://", "hf://")):
        raise conversation.error(media.field, f"is {source}. Training opens local files only: download it beforehand.")
    # pathlib takes five times as long, which is half of the time of reading a header.
    return os.path.join(conversation.folder, source.removeprefix("file://"))  # noqa: PTH118


def _load_sound(conversation: Conversation, media: Media) -> Sound:
    source = media.source
    if isinstance(source, Mapping) and "array" in source:
        return Sound(np.asarray(source["array"], np.float32), int(source["sampling_rate"]))
    soundfile = require("soundfile", what="Reading sound", install="soundfile")
    samples, sampling_rate = soundfile.read(_file_of(conversation, media, source), dtype="float32", always_2d=True)
    return Sound(samples.mean(axis=1), sampling_rate)


@contextmanager
def _naming(conversation: Conversation, media: Media) -> Iterator[None]:
    """Name row and field in whatever error a file of any kind brings about."""
    try:
        yield
    except MimoError:
        raise
    except Exception as error:
        source = media.source
        what = source if isinstance(source, str | Path) and len(str(source)) < 200 else type(source).__name__
        raise DataError(f"{conversation.where}, {media.field}: {what} cannot be read: {error}") from error

"""A processor of transformers: from a rendered conversation to tokens, what is learned of them, and encoder inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_mimo.data.chat.conversation import KINDS, Conversation, Media
from lightning_mimo.data.chat.media import image_size, load_image, load_sound, load_video
from lightning_mimo.data.chat.placeholders import ImagePlaceholders, token_of
from lightning_mimo.data.chat.template import Rendered, Span
from lightning_mimo.data.packages import require
from lightning_mimo.errors import ConfigError, MimoError

_OFFSETS = "text_replacement_offsets"
_DECODE = "Set decode_everywhere=True, so that all ranks decode images."
# Outputs that are about the text, of which the rest of the package makes its own.
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "offset_mapping", _OFFSETS)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A conversation in tokens.

    Attributes:
        ids: int64 ``[S]``, with as many placeholders as there will be embeddings.
        is_learned: bool ``[S]``.
        arguments: of encoders, as far as they are known: name -> value.
    """

    ids: np.ndarray
    is_learned: np.ndarray
    arguments: Mapping[str, torch.Tensor]


def load_processor(folder: str | Path) -> Any:
    """The processor, or the tokenizer of a text model, in a folder. Code in the folder is never run.

    Raises:
        ConfigError: if transformers is missing, or the folder has none.
    """
    transformers = require("transformers", what="A processor", install="lightning-mimo[hf]")
    if not Path(folder).is_dir():
        raise ConfigError(
            f"processor={str(folder)!r} is no folder. Give the folder of a model that has been downloaded, such as by "
            f"'hf download llava-hf/llava-1.5-7b-hf --local-dir FOLDER'."
        )
    try:
        return transformers.AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds, also for a package that is missing
        raise ConfigError(f"processor={str(folder)!r}: {' '.join(str(error).split())}") from error


class ChatProcessor:
    """Makes tokens of rendered conversations, as the processor does.

    Attributes:
        placeholders: ``image`` and so on -> the token.
    """

    def __init__(self, processor: Any, *, decode_everywhere: bool = False) -> None:
        """
        Args:
            processor: of transformers, or a tokenizer.
            decode_everywhere: not to count placeholders by the sizes of images.

        Raises:
            ConfigError: if its tokenizer does not say where in the text its tokens are.
        """
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        if not getattr(self._tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(self._tokenizer).__name__} does not say where in the text its tokens are, so that the "
                f"assistant's turns cannot be found. Use a fast tokenizer: install the package tokenizers."
            )
        found = {kind: token_of(processor, kind) for kind in KINDS} if self._is_multimodal else {}
        texts = {kind: each[0] for kind, each in found.items() if each is not None}
        self.placeholders = {kind: each[1] for kind, each in found.items() if each is not None}
        self._images: ImagePlaceholders | None = None
        if "image" in texts and not decode_everywhere:
            text = f"a{texts['image']}b"
            ids, _ = self._tokenize(text, adds_special_tokens=True)
            self._images = ImagePlaceholders(processor, lambda numbers: self._expand(ids, numbers).tolist(), text)

    @property
    def name(self) -> str:
        return type(self._processor).__name__

    @property
    def _is_multimodal(self) -> bool:
        return self._tokenizer is not self._processor

    def knows_sizes(self, conversation: Conversation) -> bool:
        """Whether headers of files tell how many placeholders there will be."""
        kinds = {media.kind for media in conversation.media}
        return not kinds or (kinds == {"image"} and self._images is not None and self._images.is_known)

    def tokens(self, conversation: Conversation, rendered: Rendered) -> Tokens:
        """Tokens of a conversation of which ``knows_sizes`` is true. No image is decoded.

        Raises:
            DataError: if an image cannot be read, or placeholders and images differ in number.
        """
        sizes = [image_size(conversation, media) for media in conversation.media]
        numbers = []
        for media, size in zip(conversation.media, sizes, strict=True):
            assert self._images is not None
            try:
                numbers.append(self._images.number(size))
            except Exception as error:  # the processor's, such as for an image that is too narrow
                raise conversation.error(media.field, f"{size.height} * {size.width} pixels: {error}") from error
        ids, offsets = self._tokenize(rendered.text, self._adds_special_tokens(rendered.text))
        self._check_numbers(conversation, ids)
        is_learned = _overlaps(offsets, rendered.spans)
        if numbers:
            is_learned = self._repeat(is_learned, ids, numbers)
            ids = self._expand(ids, numbers)
        arguments = self._images.arguments(sizes) if self._images is not None else {}
        return Tokens(ids=ids, is_learned=is_learned & ~self._is_placeholder(ids), arguments=arguments)

    def number_of_text_tokens(self, tokens: Tokens) -> int:
        """Tokens that are no placeholders."""
        return int(np.count_nonzero(~self._is_placeholder(tokens.ids)))

    def embeddings_of(self, conversation: Conversation, media: Media, *, by_size: bool) -> float:
        """About how many embeddings an item gives, in any unit where that is not known: the frames of a video, or 1.

        Args:
            conversation: that has the item.
            media: the item.
            by_size: read the header of an image where its size matters.

        Raises:
            DataError: if the header cannot be read.
        """
        if media.kind == "image" and self._images is not None and self._images.is_known:
            if self._images.fixed is not None:
                return self._images.fixed
            if by_size:
                try:
                    return self._images.number(image_size(conversation, media))
                except MimoError:
                    raise
                except Exception:  # the processor's, for an image that it does not take: loading it tells the user
                    return 1.0
        return float(len(media.source)) if isinstance(media.source, list | tuple) else 1.0

    def stand_in(self, tokens: Tokens) -> Tokens:
        """One token, from which nothing is learned, in place of a sample."""
        ids = tokens.ids[~self._is_placeholder(tokens.ids)][:1]
        return Tokens(ids=ids, is_learned=np.zeros(len(ids), dtype=bool), arguments={})

    def encode(self, conversation: Conversation, rendered: Rendered, expected: Tokens | None) -> Tokens:
        """Tokens of a conversation, and all arguments of encoders, by running the processor in full.

        Args:
            conversation: with images and the like, which are decoded.
            rendered: its text.
            expected: what :meth:`tokens` made of it, with which the result must agree.

        Raises:
            DataError: if something cannot be read, the processor refuses it, or the tokens are not as expected.
        """
        output = self._run(conversation, rendered, offsets=expected is None)
        ids = np.asarray(output["input_ids"][0], dtype=np.int64)
        arguments = {name: value for name, value in output.items() if name not in _OF_TEXT}
        if expected is None:
            is_learned = self._learned_of(conversation, rendered, output) & ~self._is_placeholder(ids)
            return Tokens(ids=ids, is_learned=is_learned, arguments=arguments)
        if not np.array_equal(ids, expected.ids):
            raise conversation.error(
                "images",
                f"the {self.name} makes {len(ids)} tokens, but {len(expected.ids)}, or others, were expected from the "
                f"sizes of the images. {_DECODE}",
            )
        for name, value in expected.arguments.items():
            if not torch.equal(torch.as_tensor(arguments[name]), value):
                made, told = (torch.as_tensor(each).tolist() for each in (arguments[name], value))
                raise conversation.error("images", f"{name} is {made}, but {told} by the sizes of images. {_DECODE}")
        return Tokens(ids=ids, is_learned=expected.is_learned, arguments=arguments)

    def _run(self, conversation: Conversation, rendered: Rendered, *, offsets: bool) -> Any:
        inputs: dict[str, Any] = {}
        for media in conversation.media:
            if media.kind == "image":
                inputs.setdefault("images", [[]])[0].append(load_image(conversation, media))
            elif media.kind == "video":
                inputs.setdefault("videos", [[]])[0].append(load_video(conversation, media))
            else:
                rate = self._sampling_rate(conversation)
                inputs.setdefault("audio", []).append(load_sound(conversation, media, rate).samples)
                inputs["sampling_rate"] = rate
        if offsets:
            inputs |= {"return_offsets_mapping": True, f"return_{_OFFSETS}": True}
        special = self._adds_special_tokens(rendered.text)
        try:
            return self._processor(text=[rendered.text], return_tensors="pt", add_special_tokens=special, **inputs)
        except MimoError:
            raise
        except Exception as error:  # the processor's own
            field = conversation.media[0].field if conversation.media else "messages"
            raise conversation.error(field, f"the {self.name} says: {error}") from error

    def _sampling_rate(self, conversation: Conversation) -> int:
        sound = getattr(self._processor, "feature_extractor", None) or getattr(self._processor, "audio_processor", None)
        if sound is None:
            field = next(media.field for media in conversation.media if media.kind == "audio")
            raise conversation.error(field, f"is sound, but the {self.name} takes none.")
        return sound.sampling_rate

    def _learned_of(self, conversation: Conversation, rendered: Rendered, output: Any) -> np.ndarray:
        """Which tokens are learned, where the processor has put other text for placeholders."""
        replaced = output.get(_OFFSETS)
        if replaced is None and conversation.media:
            raise ConfigError(
                f"The {self.name} of this version of transformers does not say what it puts for an image, so the "
                f"assistant's turns cannot be found among its tokens. Update transformers; 5.24 does."
            )
        moved = [_moved(span, replaced[0] if replaced else ()) for span in rendered.spans]
        return _overlaps(np.asarray(output["offset_mapping"][0]), moved)

    def _tokenize(self, text: str, adds_special_tokens: bool) -> tuple[np.ndarray, np.ndarray]:
        """Tokens ``[S]``, and first and last character of each ``[S, 2]``."""
        encoded = self._tokenizer(
            text, add_special_tokens=adds_special_tokens, return_offsets_mapping=True, verbose=False
        )
        offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return np.array(encoded["input_ids"], dtype=np.int64), offsets

    def _adds_special_tokens(self, text: str) -> bool:
        """As ``apply_chat_template`` of processors and of tokenizers does."""
        begin = self._tokenizer.bos_token
        return self._is_multimodal and not (begin is not None and text.startswith(begin))

    def _check_numbers(self, conversation: Conversation, ids: np.ndarray) -> None:
        for kind, token in self.placeholders.items():
            media = [each for each in conversation.media if each.kind == kind]
            if (found := int((ids == token).sum())) != len(media):
                text = self._tokenizer.convert_ids_to_tokens(token)
                raise conversation.error(
                    media[0].field if media else "messages",
                    f"the text has {found} tokens {text!r}, but there are {len(media)} of the kind {kind!r}. The chat "
                    f"template must write one for each, and no message may write it itself.",
                )

    def _expand(self, ids: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        return self._repeat(ids, ids, numbers)

    def _repeat(self, values: np.ndarray, ids: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        """Values ``[S]``, those at placeholders of images as often as each becomes."""
        times = np.ones(len(ids), dtype=np.int64)
        times[ids == self.placeholders["image"]] = numbers
        return np.repeat(values, times)

    def _is_placeholder(self, ids: np.ndarray) -> np.ndarray:
        return np.isin(ids, list(self.placeholders.values()))


def _overlaps(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens have a character of a span. Those without any, such as a first one that was added, have none."""
    found = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        found |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return found


def _moved(span: Span, replaced: Sequence[Mapping[str, Any]]) -> Span:
    """A span of the text in which placeholders have been replaced by something longer."""

    def move(character: int) -> int:
        before = [each for each in replaced if each["span"][1] <= character]
        return character + (before[-1]["new_span"][1] - before[-1]["span"][1] if before else 0)

    return move(span[0]), move(span[1])

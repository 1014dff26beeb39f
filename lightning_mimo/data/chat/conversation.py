"""A row of conversations, read and checked: messages as chat templates take them, and the images they speak of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_mimo.data.chat.rows import Row
from lightning_mimo.data.streams.tar import TarRecord
from lightning_mimo.errors import DataError

KINDS = ("image", "video", "audio")
"""What a message may hold beside text."""

_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "observation": "tool"},  # ShareGPT's
}
_FIELDS = ("messages", "conversations")
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_KEYS = frozenset((*_ROLE_KEYS, *_CONTENT_KEYS))
_PLACEHOLDER = re.compile(r"<(image|video|audio)>\n?")


@dataclass(frozen=True, kw_only=True)
class Media:
    """An image, a video or a sound of a row, not opened.

    Attributes:
        kind: one of KINDS.
        source: a path, bytes, an object: whatever the row has.
        field: where the row has it, for messages.
    """

    kind: str
    source: Any
    field: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A row, read and checked.

    Attributes:
        where: file and row, for messages.
        folder: to which paths are relative.
        messages: as chat templates take them; ``content`` is a list of ``{"type": "text", "text": ...}`` and of
            ``{"type": "image"}`` and so on.
        media: in the order of the messages.
        tools: of the row, for the template.
        files: files of a tar shard beside the row, which are looked for before those on disk.
    """

    where: str
    folder: Path
    messages: tuple[dict[str, Any], ...]
    media: tuple[Media, ...]
    tools: list[Any] | None
    files: TarRecord | None = None

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    def before(self, end: int) -> Conversation:
        """The first ``end`` messages."""
        messages = self.messages[:end]
        kept = sum(part["type"] != "text" for message in messages for part in message["content"])
        return replace(self, messages=messages, media=self.media[:kept])

    def error(self, field: str, problem: str) -> DataError:
        """An error that names the row and one of its fields."""
        return DataError(f"{self.where}, {field}: {problem}")


def read_conversation(row: Row, *, is_used: Callable[[str], bool]) -> Conversation:
    """Read a row in one of two forms, which may be mixed.

    - ``{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, ...]}, ...]}``
    - ``{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}``

    Args:
        row: the row.
        is_used: whether the chat template looks at a key of a message.

    Raises:
        DataError: naming the row, the field and the remedy.
    """
    return _Reader(row, is_used).conversation()


class _Reader:
    """Reads one row."""

    def __init__(self, row: Row, is_used: Callable[[str], bool]) -> None:
        self._row = row
        self._is_used = is_used
        self._listed = {kind: self._list_of(kind) for kind in KINDS}
        self._unused = {kind: iter(media) for kind, media in self._listed.items()}
        self._placeholders = dict.fromkeys(KINDS, 0)  # those that stand for one in the lists
        self._media: list[Media] = []

    def conversation(self) -> Conversation:
        field, messages = self._messages()
        read = tuple(self._message(message, f"{field}[{number}]") for number, message in enumerate(messages))
        for kind, media in self._listed.items():
            if self._placeholders[kind] != len(media):
                raise self._error(
                    field,
                    f"has {self._placeholders[kind]} placeholders <{kind}>, but the row has {len(media)} in {kind!r} "
                    f"or '{kind}s'. Write one placeholder for each.",
                )
        return Conversation(
            where=self._row.where,
            folder=self._row.folder,
            messages=read,
            media=tuple(self._media),
            tools=self._row.value.get("tools"),
            files=self._row.files,
        )

    def _error(self, field: str, problem: str) -> DataError:
        return DataError(f"{self._row.where}, {field}: {problem}")

    def _messages(self) -> tuple[str, Sequence[Any]]:
        row = self._row
        present = [field for field in _FIELDS if row.value.get(field) is not None]
        if len(present) != 1:
            has = f"both {_FIELDS[0]!r} and {_FIELDS[1]!r}" if present else f"the fields {list(row.value)}"
            raise DataError(f"{row.where} has {has}, but must have one of 'messages' and 'conversations'.")
        (field,) = present
        messages = row.value[field]
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise self._error(field, f"is {_short(messages)}, but must be a list of at least one message.")
        return field, messages

    def _message(self, message: Any, field: str) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise self._error(field, f"is {_short(message)}, but must be a dict with 'role' and 'content'.")
        if None in message.values():  # tables have every key
            message = {key: value for key, value in message.items() if value is not None}
        key = self._one_of(message, _ROLE_KEYS, field)
        given = message[key]
        role = _ROLES.get(given) if isinstance(given, str) else None
        if role is None:
            raise self._error(f"{field}.{key}", f"is {_short(given)}; known are {', '.join(_ROLES)}.")
        others = {key: message[key] for key in message if key not in _KEYS}
        for key in others:
            if not self._is_used(key):
                raise self._error(f"{field}.{key}", "is a key that the chat template does not look at. Leave it out.")
        says_nothing = "tool_calls" in others and not any(key in message for key in _CONTENT_KEYS)
        content = [] if says_nothing else self._content(message, field)
        return {"role": role, "content": content, **others}

    def _one_of(self, message: Mapping[str, Any], keys: tuple[str, str], field: str) -> str:
        """The key that a message has."""
        first, second = keys
        if (first in message) is (second in message):
            raise self._error(
                field, f"has the keys {list(message)}, but must have one of {' and '.join(map(repr, keys))}."
            )
        return first if first in message else second

    def _content(self, message: Mapping[str, Any], field: str) -> list[dict[str, str]]:
        key = self._one_of(message, _CONTENT_KEYS, field)
        content, field = message[key], f"{field}.{key}"
        if isinstance(content, str):
            return list(self._split(content, field)) if "<" in content else _text(content)
        if not isinstance(content, Sequence):
            raise self._error(field, f"is {_short(content)}, but must be a string or a list.")
        return [self._part(part, f"{field}[{number}]") for number, part in enumerate(content)]

    def _split(self, text: str, field: str) -> Iterator[dict[str, str]]:
        """A string in pieces, between which stand ``<image>`` and so on.

        The line break after a placeholder belongs to it, and at the end of the string the one before it: templates
        write their own.
        """
        done = end = 0
        for match in _PLACEHOLDER.finditer(text):
            kind, begin = match[1], match.start()
            if match.end() == len(text) and begin > end and text[begin - 1] == "\n":
                begin -= 1
            end = match.end()
            if kind != "image" and not self._listed[kind]:
                continue  # "<video>" and "<audio>" are words, too, of HTML
            yield from _text(text[done:begin])
            yield self._take(kind, field)
            done = end
        yield from _text(text[done:])

    def _part(self, part: Any, field: str) -> dict[str, str]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise self._error(field, f"is {_short(part)}, but must be a dict with 'type'.")
        part = {key: value for key, value in part.items() if value is not None}
        kind = str(part.get("type")).removesuffix("_url")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise self._error(f"{field}.text", f"is {_short(part.get('text'))}, but must be a string.")
            return {"type": "text", "text": part["text"]}
        if kind not in KINDS:
            raise self._error(f"{field}.type", f"is {_short(part.get('type'))}; known are text, {', '.join(KINDS)}.")
        keys = [key for key in (kind, f"{kind}_url", "url", "path", "base64") if key in part]
        if len(keys) > 1:
            raise self._error(field, f"has {' and '.join(map(repr, keys))}. Leave one of them out.")
        if not keys:
            return self._take(kind, field)
        source = part[keys[0]]
        if isinstance(source, Mapping) and set(source) == {"url"}:
            source = source["url"]
        if keys[0] == "base64":
            source = f"data:;base64,{source}"
        self._media.append(Media(kind=kind, source=source, field=f"{field}.{keys[0]}"))
        return {"type": kind}

    def _take(self, kind: str, field: str) -> dict[str, str]:
        """A placeholder, which stands for the next one in the row's list."""
        self._placeholders[kind] += 1
        if (media := next(self._unused[kind], None)) is not None:
            self._media.append(media)
        return {"type": kind}

    def _list_of(self, kind: str) -> list[Media]:
        """What the row has in a field such as ``image`` or ``images``."""
        present = [key for key in (kind, f"{kind}s") if self._row.value.get(key) is not None]
        if len(present) > 1:
            raise self._error(present[0], f"stands beside {present[1]!r}. Leave one of them out.")
        if not present:
            return []
        (key,) = present
        value = self._row.value[key]
        # One video may be a list of frames.
        several = isinstance(value, list | tuple) and not (kind == "video" and key == kind)
        if not several:
            return [Media(kind=kind, source=value, field=key)]
        return [Media(kind=kind, source=each, field=f"{key}[{number}]") for number, each in enumerate(value)]


def _text(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}] if text else []


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

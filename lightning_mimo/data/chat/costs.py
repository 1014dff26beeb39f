"""Estimates what a conversation costs each module, without tokenizing it and without decoding an image."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from lightning_mimo.data.chat.conversation import Conversation
from lightning_mimo.data.chat.processor import ChatProcessor, Tokens
from lightning_mimo.layout.module_parallelism import LANGUAGE

CostsFrom = Literal["auto", "sizes", "counts", "none"]

_CHARACTERS_PER_TOKEN = 4.0  # of English, as long as nothing else is known


class ConversationCosts:
    """Estimates the tokens of conversations for the language module, and for encoders the embeddings of their items."""

    def __init__(
        self,
        read: Callable[[int], Conversation],
        number: int,
        processor: ChatProcessor,
        modules: Mapping[str, str],
        *,
        by_size: bool,
    ) -> None:
        """
        Args:
            read: the conversation with an index.
            number: of conversations.
            processor: tells how many embeddings an image of some size gives.
            modules: kind of media -> the module that encodes it.
            by_size: read the headers of images where the processor needs to know their sizes.
        """
        self._read = read
        self._processor = processor
        self._modules = modules
        self._names = (LANGUAGE, *sorted(set(modules.values())))
        self._by_size = by_size
        self._characters = 0
        self._tokens = 0
        self._known = _shared_with_workers(number, len(self._names))

    def learn(self, conversation: Conversation, tokens: Tokens) -> None:
        """Take notice of how many tokens the text of a conversation has become."""
        self._characters += _characters(conversation)
        self._tokens += self._processor.number_of_text_tokens(tokens)

    def of(self, index: int) -> dict[str, float]:
        """Module -> estimate: tokens, placeholders included, and embeddings. Remembered for the next time.

        Raises:
            DataError: if the row, or an image whose size has to be known, cannot be read.
        """
        known = self._known[index].tolist()
        if any(map(math.isnan, known)):  # any: another worker may be writing them
            self._known[index] = self._estimated(self._read(index))
            known = self._known[index].tolist()  # rounded, as the next time: ranks must agree
        return {name: cost for name, cost in zip(self._names, known, strict=True) if cost}

    def _estimated(self, conversation: Conversation) -> list[float]:
        per_token = self._characters / self._tokens if self._characters and self._tokens else _CHARACTERS_PER_TOKEN
        costs = dict.fromkeys(self._names, 0.0)
        for media in conversation.media:
            embeddings = self._processor.embeddings_of(conversation, media, by_size=self._by_size)
            costs[LANGUAGE] += embeddings
            if media.kind in self._modules:
                costs[self._modules[media.kind]] += embeddings
        costs[LANGUAGE] += _characters(conversation) / per_token
        return list(costs.values())


def _shared_with_workers(rows: int, columns: int) -> np.ndarray:
    """float32 ``[rows, columns]``, none of which is a number yet, in memory that forked processes share.

    Workers end with the epoch; what they have found is kept. Those that are spawned get a copy.
    """
    memory = mmap.mmap(-1, max(1, rows * columns) * np.dtype(np.float32).itemsize)
    array = np.frombuffer(memory, dtype=np.float32, count=rows * columns).reshape(rows, columns)
    array.fill(np.nan)
    return array


def _characters(conversation: Conversation) -> int:
    return sum(len(part.get("text") or "") for message in conversation.messages for part in message["content"])

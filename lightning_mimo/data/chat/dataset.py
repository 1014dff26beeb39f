"""A dataset of conversations, for any model of transformers with a processor and a chat template."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import Dataset

from lightning_mimo.data.chat.conversation import Conversation, read_conversation
from lightning_mimo.data.chat.costs import ConversationCosts, CostsFrom
from lightning_mimo.data.chat.placeholders import GRID
from lightning_mimo.data.chat.processor import ChatProcessor, Tokens, load_processor
from lightning_mimo.data.chat.rows import Row, are_light, open_rows, shard_lengths_of
from lightning_mimo.data.chat.template import ChatTemplate, Rendered, TrainOn
from lightning_mimo.data.streams.sampler import SHARDS_AT_ONCE
from lightning_mimo.data.tensors import IGNORED
from lightning_mimo.errors import ConfigError, DataError

TooLong = Literal["error", "skip"]

INPUTS: Mapping[str, str | None] = {
    "pixel_values": "images.vision.pixel_values",
    "pixel_attention_mask": "images.vision.pixel_attention_mask",
    "image_sizes": "images.vision.image_sizes",
    GRID: f"images.vision.{GRID}",
    "pixel_values_videos": "videos.vision.pixel_values_videos",
    "video_grid_thw": "videos.vision.video_grid_thw",
    "second_per_grid_ts": None,
    "input_features": "audio.encoder.input_features",
    "feature_attention_mask": "audio.encoder.feature_attention_mask",
}
"""Output of a processor -> module, encoder and argument that it goes to; ``None`` for what is left out."""

_INPUT_OF = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}


class ChatDataset(Dataset[dict[str, Any]]):
    """Samples of conversations with images, videos and sound, made by the processor of a model of transformers.

    A row holds ``messages`` as chat templates take them, or ``conversations`` as those of LLaVA and ShareGPT::

        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"},
                                                   {"type": "text", "text": "What is it?"}]},
                      {"role": "assistant", "content": "A cat."}]}

        {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                             {"from": "gpt", "value": "A cat."}]}

    Tokens are those of ``processor.apply_chat_template``. Labels are -100 but for the assistant's turns. Ranks without
    an encoder open no more of an image than the header of its file, from whose size follows the number of
    placeholders; the ranks that encode compare. A processor that cannot tell is run in full on all ranks.

    Example::

        dataset = ChatDataset("data/train.jsonl", "models/llava-1.5-7b-hf")
        dataset[0]  # {"input_ids": [S], "labels": [S], "modality_inputs": {"images": {"vision": {...}}}}
    """

    def __init__(
        self,
        rows: Any,
        processor: Any,
        *,
        train_on: TrainOn = "assistant",
        for_generation: bool = False,
        labels_shifted: bool = True,
        max_length: int | None = None,
        too_long: TooLong = "error",
        media_folder: str | Path | None = None,
        chat_template: str | None = None,
        inputs: Mapping[str, str | None] | None = None,
        extra_keys: Sequence[str] = (),
        check_rows: int | None = 100,
        decode_everywhere: bool = False,
        shards_at_once: int = SHARDS_AT_ONCE,
        costs_from: CostsFrom = "auto",
    ) -> None:
        """
        Args:
            rows: path of a ``.jsonl``, ``.json``, ``.parquet`` or ``.tar`` file or of a folder of ``datasets``'
                ``save_to_disk``, a pattern with ``*`` or ``{000..127}``, or a list of these; a ``datasets.Dataset``; or
                any sequence of dicts.
            processor: of transformers, or the folder of a model that has one; a tokenizer for text alone.
            train_on: the ``"assistant"``'s turns, the ``"last"`` of them, or ``"all"`` tokens but placeholders.
            for_generation: leave out the last answer and all labels, and end with the prompt for an answer.
            labels_shifted: as for MimoModule: whether ``labels[t]`` is the token after ``input_ids[t]``.
            max_length: longest sample in tokens, placeholders included; ``None`` leaves that to the model.
            too_long: what to do with longer ones. ``"error"`` raises; ``"skip"`` puts one token without a label in
                place of the sample, which then counts for nothing. A warning names the first that a rank meets.
            media_folder: to which paths of images are relative; ``None`` takes the folder of the file with the rows.
            chat_template: in place of the processor's: text of a template, or path of a file with it.
            inputs: additions to :data:`INPUTS`: output of the processor -> ``"module.encoder.argument"`` to which it
                goes; ``None`` leaves it out.
            extra_keys: fields of a row that go into the sample, as for MimoModule. Other fields are not looked at.
            check_rows: how many rows are read beforehand, the headers of their images included; ``None`` for all.
            decode_everywhere: decode images on all ranks, in place of counting placeholders by their sizes.
            shards_at_once: row groups of parquet files that a process keeps in memory, as for ShardSampler.
            costs_from: from what :attr:`cost` estimates the work of images: ``"sizes"``, for which the headers of files
                are read if sizes matter to the processor, or ``"counts"``; ``"none"`` for no costs. ``"auto"`` is
                ``"sizes"`` for rows in JSON or in memory, and ``"none"`` for all others: every rank asks for the costs
                of all samples, and would read the images in their rows.

        Raises:
            ConfigError: for a missing file or package, or an argument that cannot be used.
            DataError: for a row that cannot be used, among those that are checked.
        """
        for name, value, known in (
            ("train_on", train_on, get_args(TrainOn)),
            ("too_long", too_long, get_args(TooLong)),
            ("costs_from", costs_from, get_args(CostsFrom)),
        ):
            if value not in known:
                raise ConfigError(f"{name}={value!r}; known are {', '.join(map(repr, known))}.")
        if too_long == "skip" and (max_length is None or for_generation):
            raise ConfigError(
                "too_long='skip' needs max_length, the longest sample in tokens, and labels: every row gets an answer "
                "where answers are generated."
            )
        self._rows = open_rows(rows, shards_at_once=shards_at_once)
        if isinstance(processor, str | Path):
            processor = load_processor(processor)
        self._template = ChatTemplate(processor, chat_template)
        self._processor = ChatProcessor(processor, decode_everywhere=decode_everywhere)
        self._train_on: TrainOn = train_on
        self._for_generation = for_generation
        self._labels_shifted = labels_shifted
        self._max_length = max_length
        self._too_long = too_long
        self._media_folder = None if media_folder is None else Path(media_folder)
        self._places = {name: _as_place(name, value) for name, value in {**INPUTS, **(inputs or {})}.items()}
        self._modules = {place[0] for place in self._places.values() if place is not None}
        self._extra_keys = tuple(extra_keys)
        self._warned: set[str] = set()  # of what
        if costs_from == "auto":
            costs_from = "sizes" if are_light(self._rows) else "none"
        self._costs = None if costs_from == "none" else self._estimates(by_size=costs_from == "sizes")
        self._check(check_rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shard_lengths(self) -> Sequence[int] | None:
        """Rows of each tar file or row group of parquet, for a ShardSampler; ``None`` for rows of other kinds."""
        return shard_lengths_of(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample with the inputs of all modules."""
        return self.load(index, self._modules)

    def load(self, index: int, modules: Collection[str]) -> dict[str, Any]:
        """A sample with the inputs of some modules.

        Args:
            index: of the row.
            modules: for which it is; of encoders that are not among them no image is decoded.

        Raises:
            DataError: naming the row, the field and the remedy.
        """
        row, conversation = self._read(index)
        rendered = self._render(conversation)
        tokens, is_complete = self._tokens(conversation, rendered)
        if not self._fits(conversation, tokens):
            return self._sample(row, self._processor.stand_in(tokens), {})
        if conversation.media and not is_complete and not self._modules.isdisjoint(modules):
            tokens = self._processor.encode(conversation, rendered, tokens)
        return self._sample(row, tokens, self._inputs(conversation, tokens))

    def length(self, index: int) -> int:
        """Tokens of a sample, placeholders included: 1 where ``too_long="skip"`` leaves the row out.

        No image is decoded for it, unless the processor cannot tell placeholders from sizes.

        Raises:
            DataError: naming the row, the field and the remedy; also if it is too long and that is an error.
        """
        _, conversation = self._read(index)
        tokens, _ = self._tokens(conversation, self._render(conversation))
        return len((tokens if self._fits(conversation, tokens) else self._processor.stand_in(tokens)).ids)

    @property
    def cost(self) -> Callable[[int], dict[str, float]] | None:
        """``cost(index)``, about how much work a sample is for each module: tokens for the language module, embeddings
        for encoders; ``None`` if ``costs_from`` says so.

        Text is counted in characters, of which the rows that were checked tell how many make a token. It raises a
        DataError that names the row if that cannot be read.
        """
        return None if self._costs is None else self._costs.of

    def _estimates(self, *, by_size: bool) -> ConversationCosts:
        modules = {kind: place[0] for kind, name in _INPUT_OF.items() if (place := self._places[name]) is not None}
        return ConversationCosts(self._conversation, len(self), self._processor, modules, by_size=by_size)

    def _conversation(self, index: int) -> Conversation:
        return self._read(index)[1]

    def _check(self, rows: int | None) -> None:
        """Read rows before training."""
        if len(self) == 0:
            raise ConfigError("There are no conversations: the file or dataset has no rows.")
        for index in range(len(self) if rows is None else min(rows, len(self))):
            row, conversation = self._read(index)
            rendered = self._render(conversation)
            self._extras(row)
            if self._processor.knows_sizes(conversation):
                tokens = self._processor.tokens(conversation, rendered)
                if self._costs is not None:
                    self._costs.learn(conversation, tokens)
                self._fits(conversation, tokens)
            else:
                self._tell_that_all_decode(conversation)

    def _read(self, index: int) -> tuple[Row, Conversation]:
        row = self._rows.read(index)
        if self._media_folder is not None:
            row = replace(row, folder=self._media_folder)
        return row, read_conversation(row, is_used=self._template.is_used)

    def _render(self, conversation: Conversation) -> Rendered:
        if self._for_generation:
            return Rendered(text=self._template.prompt(conversation), spans=())
        return self._template.render(conversation, self._train_on)

    def _tokens(self, conversation: Conversation, rendered: Rendered) -> tuple[Tokens, bool]:
        """And whether all arguments of encoders are there already."""
        if self._processor.knows_sizes(conversation):
            return self._processor.tokens(conversation, rendered), False
        self._tell_that_all_decode(conversation)
        return self._processor.encode(conversation, rendered, None), True

    def _tell_that_all_decode(self, conversation: Conversation) -> None:
        if "decode" not in self._warned:
            self._warned.add("decode")
            kinds = sorted({media.kind for media in conversation.media})
            rank_zero_warn(
                f"{self._processor.name} does not tell from the size alone how many placeholders an input of the kind "
                f"{' or '.join(kinds)} becomes ({conversation.where}), so all ranks decode, those of the language "
                f"module included."
            )

    def _fits(self, conversation: Conversation, tokens: Tokens) -> bool:
        """Whether a sample is used.

        Raises:
            DataError: if it is too long and that is an error.
        """
        length, limit = len(tokens.ids), self._max_length
        if limit is None or length <= limit:
            return True
        problem = f"{length} tokens, placeholders included, are more than max_length={limit}"
        if self._too_long == "error":
            raise conversation.error(
                "messages", f"{problem}. Shorten it, raise max_length, or leave such rows out with too_long='skip'."
            )
        if "skip" not in self._warned:
            self._warned.add("skip")
            warnings.warn(
                f"{conversation.where}: {problem}: it is skipped, as are all such rows, of which this is the first "
                f"here. ChatDataset.length(index) is 1 for each of them.",
                stacklevel=2,
            )
        return False

    def _sample(self, row: Row, tokens: Tokens, modality_inputs: dict[str, Any]) -> dict[str, Any]:
        sample: dict[str, Any] = {
            "input_ids": torch.from_numpy(tokens.ids),
            "modality_inputs": modality_inputs,
            **self._extras(row),
        }
        if not self._for_generation:
            labels = np.where(tokens.is_learned, tokens.ids, IGNORED)
            if self._labels_shifted:
                labels = np.append(labels[1:], IGNORED)
            sample["labels"] = torch.from_numpy(labels)
        return sample

    def _extras(self, row: Row) -> dict[str, Any]:
        missing = [key for key in self._extra_keys if key not in row.value]
        if missing:
            raise DataError(f"{row.where}, {missing[0]}: is missing, but extra_keys has it.")
        return {key: row.value[key] for key in self._extra_keys}

    def _inputs(self, conversation: Conversation, tokens: Tokens) -> dict[str, dict[str, dict[str, Any]]]:
        """The arguments of encoders, under the names of modules and encoders."""
        inputs: dict[str, dict[str, dict[str, Any]]] = {}
        for name, value in tokens.arguments.items():
            if name not in self._places:
                raise conversation.error(
                    conversation.media[0].field,
                    f"the {self._processor.name} makes {name!r} of it, for which there is no place. Say to which "
                    f"argument it goes, inputs={{{name!r}: 'module.encoder.argument'}}, or None to leave it out.",
                )
            if (place := self._places[name]) is not None:
                module, encoder, argument = place
                inputs.setdefault(module, {}).setdefault(encoder, {})[argument] = value
        return inputs


def _as_place(name: str, value: str | None) -> tuple[str, str, str] | None:
    if value is None:
        return None
    parts = value.split(".")
    if len(parts) != 3:
        raise ConfigError(f"inputs[{name!r}]={value!r} must have three parts, 'module.encoder.argument'.")
    module, encoder, argument = parts
    return module, encoder, argument

"""Conversations for training, validation, test and prediction, to be named in a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lightning_mimo.data.chat.costs import CostsFrom
from lightning_mimo.data.chat.dataset import ChatDataset, TooLong
from lightning_mimo.data.chat.template import TrainOn
from lightning_mimo.data.streams.files import expand_braces
from lightning_mimo.data.streams.sampler import SHARDS_AT_ONCE, ShardSampler
from lightning_mimo.errors import ConfigError

_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class ChatData(pl.LightningDataModule):
    """DataLoaders over conversations. The batch size is the ``global_batch_size`` of the strategy.

    Example::

        data:
          class_path: lightning_mimo.data.ChatData
          init_args:
            train: data/train.jsonl
            val: data/val.jsonl
            processor: models/llava-1.5-7b-hf
            max_length: 2048
            too_long: skip
    """

    def __init__(
        self,
        *,
        train: Any = None,
        val: Any = None,
        test: Any = None,
        predict: Any = None,
        processor: Any = None,
        train_on: TrainOn = "assistant",
        max_length: int | None = None,
        too_long: TooLong = "error",
        media_folder: str | None = None,
        chat_template: str | None = None,
        inputs: dict[str, str | None] | None = None,
        check_rows: int | None = 100,
        decode_everywhere: bool = False,
        costs_from: CostsFrom = "auto",
        shards_at_once: int = SHARDS_AT_ONCE,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """
        Args:
            train: rows to train on, in a random order: a path, a pattern, a list of them, or what ChatDataset takes.
            val: rows to validate on.
            test: rows to test on.
            predict: rows to answer. The last message of a row is left out if it is an answer.
            processor: of transformers, or a folder with one; ``None`` takes the folder of a HuggingFaceModule.
            train_on: as for ChatDataset.
            max_length: as for ChatDataset.
            too_long: as for ChatDataset; a row to answer is never skipped.
            media_folder: as for ChatDataset.
            chat_template: as for ChatDataset.
            inputs: as for ChatDataset.
            check_rows: as for ChatDataset; of each of the four.
            decode_everywhere: as for ChatDataset.
            costs_from: as for ChatDataset.
            shards_at_once: tar files, or row groups of parquet files, whose rows are mixed when they are shuffled.
            num_workers: worker processes of each DataLoader on each rank.
            pin_memory: as for DataLoader.

        Raises:
            ConfigError: if there are no rows.
        """
        super().__init__()
        self._rows = {"train": train, "val": val, "test": test, "predict": predict}
        if all(rows is None for rows in self._rows.values()):
            raise ConfigError("ChatData has no rows: give train=, val=, test= or predict=.")
        for name, rows in self._rows.items():
            if rows is None:  # Lightning goes by whether a method is overridden
                vars(self)[f"{name}_dataloader"] = getattr(super(), f"{name}_dataloader")
        self._processor = processor
        self._train_on: TrainOn = train_on
        self._too_long: TooLong = too_long
        self._options: Mapping[str, Any] = {
            "max_length": max_length,
            "media_folder": media_folder,
            "chat_template": chat_template,
            "inputs": inputs,
            "check_rows": check_rows,
            "decode_everywhere": decode_everywhere,
            "costs_from": costs_from,
            "shards_at_once": shards_at_once,
        }
        self._shards_at_once = shards_at_once
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._datasets: dict[str, ChatDataset] = {}

    def check_paths(self) -> None:
        """Check that all files and folders exist. MimoStrategy calls it before any process group exists.

        A dry run needs none of them.

        Raises:
            ConfigError: naming the argument and the path.
        """
        for name, given in {**self._rows, "processor": self._processor}.items():
            for each in given if isinstance(given, list | tuple) else [given]:
                if isinstance(each, str | Path) and not _is_pattern(str(each)) and not Path(each).exists():
                    raise ConfigError(
                        f"ChatData({name}={str(each)!r}): there is no such file or folder. Paths are relative to where "
                        f"the command runs."
                    )

    def setup(self, stage: str) -> None:
        """Open the rows, load the processor and check the first rows.

        Args:
            stage: "fit", "validate", "test" or "predict", from Lightning.

        Raises:
            ConfigError: if the processor is missing, or an argument cannot be used.
            DataError: if a row cannot be used.
        """
        for name in _STAGES[stage]:
            if self._rows[name] is not None and name not in self._datasets:
                self._datasets[name] = self._dataset(name)

    def train_dataloader(self) -> DataLoader:
        """The shuffled loader of the rows to train on."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        """The loader of the rows to validate on."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """The loader of the rows to test on."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        """The loader of the rows to answer."""
        return self._loader("predict")

    def _loader(self, name: str) -> DataLoader:
        dataset, is_shuffled = self._datasets[name], name == "train"
        has_shards = is_shuffled and dataset.shard_lengths is not None
        # batch_size is left at 1: MimoStrategy makes global batches of the size that it has.
        return DataLoader(
            dataset,
            shuffle=is_shuffled and not has_shards,
            sampler=ShardSampler(dataset, shards_at_once=self._shards_at_once) if has_shards else None,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
        )

    def _dataset(self, name: str) -> ChatDataset:
        module = self.trainer.lightning_module if self.trainer is not None else None
        if self._processor is None:
            self._processor = getattr(module, "pretrained", None)
            if self._processor is None:
                raise ConfigError("ChatData(processor=...) is missing: give the folder of a model that has one.")
        answers = name == "predict"
        return ChatDataset(
            self._rows[name],
            self._processor,
            train_on=self._train_on,
            for_generation=answers,
            too_long="error" if answers else self._too_long,
            labels_shifted=getattr(module, "labels_shifted", True),
            extra_keys=getattr(module, "extra_keys", ()),
            **self._options,
        )


def _is_pattern(path: str) -> bool:
    return "*" in path or expand_braces(path) != [path]

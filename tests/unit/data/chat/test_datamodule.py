"""The datamodule of conversations: what Lightning finds in it, and what it takes from the module that trains."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import RandomSampler, SequentialSampler

from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.data import ChatData, ShardSampler
from lightning_mimo.errors import ConfigError, DataError

pytest.importorskip("transformers")
pytest.importorskip("torchvision", reason="transformers' processors of videos need it")

from tests.support import processors
from tests.support.shards import write_tar

ROW = {"messages": [{"role": "user", "content": "Yes?"}, {"role": "assistant", "content": "A cat."}], "weight": 2.0}


def trained_by(data: ChatData, **attributes: Any) -> ChatData:
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(**attributes))  # type: ignore[assignment]
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A processor, and ``rows.jsonl``."""
    folder = tmp_path_factory.mktemp("llava")
    processors.llava().save_pretrained(folder)
    (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW))
    return folder


def test_loaders(folder: Path) -> None:
    data = ChatData(train=str(folder / "rows.jsonl"), val=[ROW], processor=str(folder), num_workers=1)
    data.setup("fit")
    train, val = data.train_dataloader(), data.val_dataloader()
    assert isinstance(train.sampler, RandomSampler)
    assert isinstance(val.sampler, SequentialSampler)
    assert (len(train.dataset), len(val.dataset)) == (2, 1)
    # MimoStrategy then makes batches of its global_batch_size.
    assert train.batch_size == val.batch_size == 1
    assert train.num_workers == 1
    found = [name for name in ("train", "val", "test", "predict") if is_overridden(f"{name}_dataloader", data)]
    assert found == ["train", "val"], "Lightning does not look for data that there is not"


def test_shards_are_shuffled_a_few_at_a_time(folder: Path) -> None:
    for shard in range(2):
        write_tar(folder / f"{shard}.tar", [(f"{shard}", {"json": json.dumps(ROW).encode()})])
    pattern = f"{folder}/{{0..1}}.tar"
    data = ChatData(train=pattern, val=pattern, processor=str(folder), shards_at_once=1)
    data.check_paths()
    data.setup("fit")
    assert isinstance(data.train_dataloader().sampler, ShardSampler)
    assert isinstance(data.val_dataloader().sampler, SequentialSampler)


def test_what_the_module_says_is_not_said_again(folder: Path) -> None:
    data = ChatData(train=[ROW], predict=[ROW])
    data = trained_by(data, pretrained=folder, labels_shifted=False, extra_keys=("weight",))
    data.setup("fit")
    data.setup("predict")
    sample, prompt = data.train_dataloader().dataset[0], data.predict_dataloader().dataset[0]
    counted = sample["labels"] != -100
    assert torch.equal(sample["labels"][counted], sample["input_ids"][counted])
    assert sample["weight"] == prompt["weight"] == 2.0
    assert "labels" not in prompt


def test_a_processor_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"ChatData\(processor=...\) is missing"):
        trained_by(ChatData(train=[ROW])).setup("fit")


def test_there_must_be_rows(folder: Path) -> None:
    with pytest.raises(ConfigError, match="ChatData has no rows"):
        ChatData(processor=str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": "none.jsonl"}, r"ChatData\(val='none.jsonl'\): there is no such file or folder"),
        ({"val": ["none.jsonl"]}, r"ChatData\(val='none.jsonl'\): there is no such file or folder"),
        ({"processor": "none"}, r"ChatData\(processor='none'\): there is no such"),
    ],
)
def test_paths_are_checked_before_there_are_process_groups(options: dict[str, Any], message: str, folder: Path) -> None:
    strategy = MimoStrategy({"images": ModuleParallelism(), "language": ModuleParallelism()}, 4)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    trainer.datamodule = ChatData(**{"train": [ROW], "processor": str(folder), **options})
    with pytest.raises(ConfigError, match=message):
        strategy.validate(trainer)


def test_rows_are_checked_in_setup(folder: Path) -> None:
    data = ChatData(train=[ROW, {"messages": []}], processor=str(folder))
    with pytest.raises(DataError, match="row 1, messages"):
        data.setup("fit")


def test_yaml(folder: Path) -> None:
    """As LightningCLI reads it."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    options = {"train": str(folder / "rows.jsonl"), "processor": str(folder), "max_length": 8, "too_long": "skip"}
    config = yaml.safe_dump({"data": {"class_path": "lightning_mimo.data.ChatData", "init_args": options}})
    data = parser.instantiate_classes(parser.parse_string(config)).data
    assert isinstance(data, ChatData)
    with pytest.warns(UserWarning, match=r"rows.jsonl, row 0 \(line 1\): \d+ tokens, .* more than max_length=8"):
        data.setup("fit")

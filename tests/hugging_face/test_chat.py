"""From a JSONL file with images to a trained model, by YAML alone: the same curve in every layout, packed or not."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("transformers")
pytest.importorskip("torchvision", reason="transformers' processors of videos need it")

import transformers

from lightning_mimo.commands.cli import main
from lightning_mimo.data import ChatDataset
from lightning_mimo.data.packing import Packing, pack_rows
from tests.hugging_face.tiny_models import MODELS, PATCH, RESOLUTIONS, VISION
from tests.support import processors
from tests.support.rank_pool import RankPool

BATCH, PACKED_ROWS, EPOCHS = 8, 4, 3
SIZES = [(16, 16), (20, 41), (33, 17), (48, 30), (25, 25)]
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "one rank": ({"modules": {"images": {}, "language": {}}, "colocate": True}, 1),
    "apart": ({"modules": {"images": {"dp": 2}, "language": {"tp": 2, "dp": 1}}, "num_microbatches": 2}, 4),
}


def make_llava(folder: Path) -> None:
    processor = processors.llava(size=VISION["image_size"])
    _save(folder, "llava_clip", processor, image_token_index=processor.image_token_id)


def make_llava_next(folder: Path) -> None:
    processor = processors.llava_next(RESOLUTIONS)
    _save(folder, "llava_next", processor, image_token_index=processor.image_token_id)


def make_idefics3(folder: Path) -> None:
    processor = processors.idefics3()
    _save(folder, "idefics3", processor, image_token_id=processor.image_token_id)


def make_qwen(folder: Path) -> None:
    processor = processors.qwen("Qwen2_5_VL", patch_size=PATCH["patch_size"])
    ids = processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    tokens = {"vision_start_token_id": ids[0], "vision_end_token_id": ids[1]}
    placeholders = {"image_token_id": processor.image_token_id, "video_token_id": processor.video_token_id}
    _save(folder, "qwen2_5_vl", processor, **tokens, **placeholders)


def _save(folder: Path, kind: str, processor: Any, **config: Any) -> None:
    torch.manual_seed(7)
    model = MODELS[kind]()
    model.resize_token_embeddings(400)
    model.config.text_config.max_position_embeddings = 512
    for name, value in config.items():
        setattr(model.config, name, value)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_rows(folder: Path, name: str, number: int) -> None:
    """Questions about none to three images of different sizes, in both forms of rows."""
    (folder / "images").mkdir(exist_ok=True)
    with (folder / name).open("w") as lines:
        for index in range(number):
            images = []
            for height, width in (SIZES * 2)[index % 5 :][: index % 4]:
                images.append(f"images/{height}x{width}.png")
                processors.image(height, width, seed=height).save(folder / images[-1])
            question, answer = f"What is in {index}?", ["A cat.", "A dog and a cat."][index % 2]
            if index % 2:
                row = {
                    "image": images,
                    "conversations": [
                        {"from": "human", "value": "<image>\n" * len(images) + question},
                        {"from": "gpt", "value": answer},
                    ],
                }
            else:
                content = [*({"type": "image", "path": path} for path in images), {"type": "text", "text": question}]
                row = {
                    "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
                }
            lines.write(json.dumps(row) + "\n")


def write_config(folder: Path, layout: str, *, pack_to: int | None = None) -> Path:
    options, ranks = LAYOUTS[layout]
    logs = logs_of(folder, layout, pack_to)
    config = {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "devices": ranks,
            "precision": "64-true",
            "max_epochs": EPOCHS,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": str(logs),
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(logs), "name": "", "version": "run"},
            },
            "strategy": {
                "class_path": "lightning_mimo.MimoStrategy",
                "init_args": {
                    **options,
                    "global_batch_size": BATCH if pack_to is None else PACKED_ROWS,
                    "pack_to": pack_to,
                    "cluster_environment": {"class_path": "tests.parity.layouts.PoolEnvironment"},
                },
            },
        },
        "model": {
            "class_path": "lightning_mimo.HuggingFaceModule",
            "init_args": {"pretrained": str(folder / "model"), "lr": 3e-3},
        },
        "data": {
            "class_path": "lightning_mimo.data.ChatData",
            "init_args": {"train": str(folder / "train.jsonl"), "val": str(folder / "val.jsonl"), "max_length": 512},
        },
    }
    file = folder / f"{logs.name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def logs_of(folder: Path, layout: str, pack_to: int | None) -> Path:
    return folder / (layout.replace(" ", "_") + ("" if pack_to is None else "_packed"))


def budget_of(folder: Path, file: str) -> int:
    """Tokens of a row with which all samples of a file are packed into the rows of one step, in any order."""
    dataset = ChatDataset(folder / file, transformers.AutoProcessor.from_pretrained(folder / "model"))
    lengths = np.array([dataset.length(index) for index in range(len(dataset))])
    budgets = range(int(lengths.max()), int(lengths.sum()))
    return next(
        budget
        for budget in budgets
        if len(pack_rows(range(len(lengths)), Packing(budget=budget, lengths=lengths))) == PACKED_ROWS
    )


def run_command(config: str) -> None:
    """As the command line does, on a rank of the pool."""
    sys.argv = ["lightning-mimo"]
    main(["fit", "--config", config])


def curves(folder: Path, layout: str, *, pack_to: int | None = None) -> dict[str, list[float]]:
    """Metric -> its values, in the order of the steps."""
    rows = logged(folder, layout, pack_to)
    names = ("train/loss", "train/grad_norm", "train/grad_norm/images", "val/loss")
    return {name: [float(row[name]) for row in rows if row.get(name)] for name in names}


def logged(folder: Path, layout: str, pack_to: int | None) -> list[dict[str, str]]:
    with (logs_of(folder, layout, pack_to) / "run" / "metrics.csv").open() as lines:
        return list(csv.DictReader(lines))


def loss_of_transformers(folder: Path, file: Path) -> float:
    """Of rows before training, from what the processor makes of them in full; labels are those of ChatDataset."""
    processor = transformers.AutoProcessor.from_pretrained(folder / "model")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float64).eval()
    dataset = ChatDataset(file, processor, labels_shifted=False)
    total = count = 0.0
    for index in range(len(dataset)):
        sample = dataset[index]
        inputs = sample["modality_inputs"].get("images", {}).get("vision", {})
        if "image_grid_thw" in inputs:
            inputs = {**inputs, "mm_token_type_ids": (sample["input_ids"] == processor.image_token_id).long()[None]}
        with torch.no_grad():
            logits = model(input_ids=sample["input_ids"][None], **inputs).logits[0]
        labels = sample["labels"][1:]
        total += float(torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.hugging_face
@pytest.mark.filterwarnings("ignore:Idefics3Processor does not tell from the size alone:UserWarning")
@pytest.mark.parametrize("make_model", [make_llava, make_llava_next, make_idefics3, make_qwen])
def test_yaml_trains_the_same_in_two_layouts(make_model: Any, rank_pool: RankPool, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    write_rows(tmp_path, "train.jsonl", BATCH)  # one step an epoch
    write_rows(tmp_path, "val.jsonl", BATCH)
    found = {}
    for layout, (_, ranks) in LAYOUTS.items():
        rank_pool.run(run_command, str(write_config(tmp_path, layout)), world_size=ranks, timeout=600)
        found[layout] = curves(tmp_path, layout)
    alone, apart = found.values()
    assert [len(values) for values in alone.values()] == [EPOCHS] * 4
    for name, values in alone.items():
        assert apart[name] == pytest.approx(values, rel=1e-6), name  # as precise as they are logged
    assert alone["train/loss"][0] == pytest.approx(loss_of_transformers(tmp_path, tmp_path / "train.jsonl"), rel=1e-6)
    assert alone["val/loss"][-1] < alone["val/loss"][0]


@pytest.mark.hugging_face
@pytest.mark.parametrize("make_model", [make_llava, make_qwen])
def test_yaml_trains_packed_as_it_trains_sample_by_sample(make_model: Any, rank_pool: RankPool, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    write_rows(tmp_path, "train.jsonl", BATCH)
    write_rows(tmp_path, "val.jsonl", BATCH)
    budget = budget_of(tmp_path, "train.jsonl")
    rank_pool.run(run_command, str(write_config(tmp_path, "one rank")), world_size=1, timeout=600)
    alone = curves(tmp_path, "one rank")
    assert [len(values) for values in alone.values()] == [EPOCHS] * 4
    for layout, (_, ranks) in LAYOUTS.items():
        config = write_config(tmp_path, layout, pack_to=budget)
        rank_pool.run(run_command, str(config), world_size=ranks, timeout=600)
        packed = curves(tmp_path, layout, pack_to=budget)
        for name, values in alone.items():
            assert packed[name] == pytest.approx(values, rel=1e-6), (layout, name)
    padding = {
        pack_to: [float(row["train/padding"]) for row in logged(tmp_path, "one rank", pack_to) if row["train/padding"]]
        for pack_to in (None, budget)
    }
    assert padding[budget] == [1.0] * EPOCHS
    assert min(padding[None]) > 1

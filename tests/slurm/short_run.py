"""A run of the digits config that takes a few steps, and how it ended."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from lightning_mimo.commands.cli import checkpoint_tool

ROOT = Path(__file__).parents[2]
CONFIG = "configs/digits_vlm.yaml"
STEPS = 20
SHORT = (
    f"--trainer.max_steps={STEPS}",
    f"--trainer.val_check_interval={STEPS}",
    "--trainer.log_every_n_steps=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.strategy.init_args.global_batch_size=32",
    "--data.global_batch_size=32",
    "--data.val_samples=64",
)


def shortened(folder: Path, *, pause: float = 0.0) -> list[str]:
    """Arguments of a short run that writes into a folder, and waits a little after each step."""
    progress = {"class_path": "tests.kill.run_once.Progress", "init_args": {"folder": str(folder), "pause": pause}}
    return [
        *SHORT,
        f"--trainer.callbacks={json.dumps([progress])}",
        f"--trainer.default_root_dir={folder}/root",
        f"--trainer.logger.init_args.save_dir={folder}",
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the end."""
    (path,) = folder.glob(f"lightning_logs/version_*/checkpoints/*step={STEPS}.ckpt")
    checkpoint_tool(["export", str(path), str(folder / "final.safetensors")])
    return load_file(folder / "final.safetensors")


def losses(folder: Path) -> dict[int, str]:
    """By step, as they were written, of all parts of a run."""
    rows: list[dict[str, str]] = []
    for file in sorted(folder.glob("lightning_logs/version_*/metrics.csv")):
        with file.open() as lines:
            rows += csv.DictReader(lines)
    return {int(row["step"]): row["train/loss"] for row in rows if row["train/loss"]}


def check_same(folder: Path, other: Path) -> None:
    assert losses(folder) == losses(other)
    assert sorted(losses(folder)) == list(range(STEPS))
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

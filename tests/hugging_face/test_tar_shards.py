"""A fine-tune from tar shards, by YAML alone, that is killed twice and goes on in other layouts, has the same curve."""

from __future__ import annotations

import csv
import io
import json
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytest.importorskip("transformers")
pytest.importorskip("torchvision", reason="transformers' processors of videos need it")

from tests.hugging_face.test_chat import BATCH, SIZES, make_llava
from tests.kill.driver import RUN_SECONDS, START_SECONDS, processes_of
from tests.support import processors
from tests.support.run_host import HostedRun, RunHost
from tests.support.shards import write_tar

ROWS, SHARDS, EPOCHS = 36, 4, 4  # five steps an epoch, of which the last has four rows
STEPS = EPOCHS * -(-ROWS // BATCH)
LAYOUTS: list[tuple[dict[str, Any], int]] = [
    ({"modules": {"images": {"dp": 2}, "language": {"tp": 2, "dp": 1}}, "num_microbatches": 2}, 4),
    ({"modules": {"images": {"dp": 2}, "language": {"pp": 2, "dp": 1}}, "num_microbatches": 2}, 4),
    ({"modules": {"images": {}, "language": {}}, "colocate": True}, 1),
]


def write_rows(folder: Path) -> None:
    """Questions about none to two images, which stand beside their row and are named by it, or not."""
    for shard in range(SHARDS):
        samples = []
        for number in range(shard, ROWS, SHARDS):
            files = {f"{place}.png": _png(SIZES[(number + place) % 5], number) for place in range(number % 3)}
            question, answer = f"What is in {number}?", ["A cat.", "A dog and a cat."][number % 2]
            if number % 2:
                talk = [{"from": "human", "value": "<image>\n" * len(files) + question}]
                row: dict[str, Any] = {"image": list(files), "conversations": [*talk, {"from": "gpt", "value": answer}]}
            else:
                content = [*({"type": "image"} for _ in files), {"type": "text", "text": question}]
                row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
            samples.append((f"{number:04d}", {"json": json.dumps(row).encode(), **files}))
        write_tar(folder / f"train-{shard}.tar", samples)


def _png(size: tuple[int, int], seed: int) -> bytes:
    file = io.BytesIO()
    processors.image(*size, seed=seed).save(file, "png")
    return file.getvalue()


def write_config(folder: Path, run: Path, layout: int, attempt: int) -> Path:
    options, ranks = LAYOUTS[layout]
    logger = {"save_dir": str(run), "name": "", "version": f"attempt{attempt}", "flush_logs_every_n_steps": 1}
    saving = {"dirpath": str(run / "checkpoints"), "filename": "last", "every_n_train_steps": 2}
    config = {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "devices": ranks,
            "precision": "64-true",
            "max_epochs": EPOCHS,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(run),
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger},
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {**saving, "enable_version_counter": False},
                }
            ],
            "strategy": {
                "class_path": "lightning_mimo.MimoStrategy",
                "init_args": {**options, "global_batch_size": BATCH},
            },
        },
        "model": {
            "class_path": "lightning_mimo.HuggingFaceModule",
            "init_args": {"pretrained": str(folder / "model"), "lr": 3e-3},
        },
        "data": {
            "class_path": "lightning_mimo.data.ChatData",
            "init_args": {
                "train": f"{folder}/train-{{0..{SHARDS - 1}}}.tar",
                "max_length": 512,
                "shards_at_once": 2,
                "num_workers": 1,
            },
        },
    }
    file = run / f"attempt{attempt}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def run(host: RunHost, folder: Path, name: str, layouts: list[int], kills: list[int]) -> dict[int, float]:
    """Run to the end, killed when a checkpoint of some step is there. Returns the loss of every step."""
    here = folder / name
    here.mkdir()
    losses: dict[int, float] = {}
    for attempt, layout in enumerate(layouts):
        config = write_config(folder, here, layout, attempt)
        resume = ["--ckpt_path", str(here / "checkpoints" / "last.ckpt")] if attempt else []
        arguments = ["fit", "--config", str(config), *resume]
        process = host.start("lightning_mimo.commands.cli:main", *arguments, log=here / "log")
        if attempt < len(kills):
            kill(here, attempt, process, at=kills[attempt])
        else:
            assert process.wait(timeout=RUN_SECONDS) == 0, (here / "log").read_text()[-3000:]
        losses |= logged(here, attempt)
    return losses


def logged(folder: Path, attempt: int) -> dict[int, float]:
    """Loss of every step that a run has written down whole."""
    file = folder / f"attempt{attempt}" / "metrics.csv"
    if not file.exists():
        return {}
    lines = file.read_text().splitlines(keepends=True)
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}


def kill(folder: Path, attempt: int, process: HostedRun, *, at: int) -> None:
    """Kill rank 1 when the run comes to a step."""
    deadline = time.monotonic() + START_SECONDS
    while max(logged(folder, attempt), default=0) < at:
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        time.sleep(0.01)
    # Rank 0 starts the others before its worker.
    rank = min(psutil.Process(process.pid).children(), key=lambda child: child.create_time())
    rank.send_signal(signal.SIGKILL)
    assert process.wait(timeout=RUN_SECONDS) != 0, "the run had come to its end"
    while processes_of(process.pid):
        time.sleep(0.02)


@pytest.mark.hugging_face
def test_twice_killed_has_the_curve_of_one_left_alone(run_host: RunHost, tmp_path: Path) -> None:
    make_llava(tmp_path / "model")
    write_rows(tmp_path)
    alone = run(run_host, tmp_path, "alone", layouts=[2], kills=[])
    killed = run(run_host, tmp_path, "killed", layouts=[0, 1, 2], kills=[4, 10])
    assert sorted(alone) == sorted(killed) == list(range(STEPS))
    assert killed == pytest.approx(alone, rel=1e-6)  # as precise as they are logged
    assert alone[STEPS - 1] < alone[0]

"""``lightning-mimo plan`` on the configs of this repository, and on a step that one of them has recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.exhaustive

CONFIGS = sorted(Path("configs").glob("*.yaml"))
SMALL = ("digits", "tiny")


def lightning_mimo(*arguments: str) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "lightning_mimo", *arguments], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def made_tiny(tmp_path: Path) -> Path:
    """Folder with a tiny LLaVA and its data."""
    folder = tmp_path / "tiny_llava"
    subprocess.run([sys.executable, "-m", "examples.llava.make_tiny", str(folder)], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_planned(config: Path, tmp_path: Path) -> None:
    if "digits" not in config.stem and config.stem not in ("llava_7b", "vlm_70b"):
        pytest.importorskip("transformers")
    options = ["--config", str(config)]
    if config.stem == "tiny_llava":
        options.append(f"--model.init_args.pretrained={made_tiny(tmp_path)}/model")
    gpus = 8 if config.stem.startswith(SMALL) else 256
    plan = tmp_path / "plan.yaml"
    text = lightning_mimo("plan", *options, "--gpus", str(gpus), "--write", str(plan))
    assert f"{gpus} x h100" in text and "tokens/s/GPU" in text and "Not modelled:" in text
    layout = lightning_mimo("layout", "--config", str(plan))
    assert "images" in layout and "language" in layout


def test_conversations_of_different_length_are_part_of_the_price(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = made_tiny(tmp_path)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row in rows[::8]:
        answer = row["conversations"][1]
        row["conversations"] += [{"from": "human", "value": "What colour is it?"}, answer] * 5
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"--data.init_args.{part}={folder}/{part}.jsonl" for part in ("train", "val")]
    model = f"--model.init_args.pretrained={folder}/model"
    command = ("plan", "--config", "configs/tiny_llava.yaml", model, *data, "--sample=data", "--hardware=cpu")
    text = lightning_mimo(*command, "--gpus=4")
    assert "53 tokens per sample as in the largest sample of the data" in text and "with data" in text
    assert "largest of the first 200 samples, which have\n  tokens: mean 18, 95 % up to 53, at most 53" in text
    curve = lightning_mimo(*command, "--gpus=2,4")
    assert "of the first" in curve


def test_a_recorded_step_beside_its_simulation(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the integrations dependency group")
    config = "configs/digits_vlm.yaml"
    options = ["--trainer.max_steps=7", f"--trainer.default_root_dir={tmp_path}", "--trainer.limit_val_batches=0"]
    lightning_mimo("fit", "--config", config, *options, "--trainer.val_check_interval=null", "--trace", str(tmp_path))
    text = lightning_mimo("plan", "--config", config, "--compare", str(tmp_path / "step=5.json"), "--hardware", "cpu")
    assert "apart: images dp=2; language tp=2 dp=1; 1 microbatches" in text
    for row in ("step", "images    forward", "images    backward", "language  forward", "language  optimizer"):
        assert any(line.startswith(row) for line in text.splitlines()), row
    assert "largest difference besides waiting:" in text

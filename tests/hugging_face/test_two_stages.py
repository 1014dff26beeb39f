"""The guide's way from a pretrained folder through two stages to a folder again, by its commands."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")

from lightning_mimo.checkpoint.directory import read_manifest
from lightning_mimo.commands.cli import main
from tests.support.pages import blocks_of, commands_of
from tests.support.rank_pool import RankPool

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide" / "pretrained.md"
MAKE, STAGE_1, STAGE_2, EXPORT, ANSWER = (
    command[4:] for command in commands_of(GUIDE) if command[:4] == ["uv", "run", "--extra", "hf"]
)


def run_in(folder: Path, arguments: Sequence[str], output: Path) -> None:
    """What ``lightning-mimo ARGUMENTS`` does in a folder, in a process that has paid for the imports."""
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    with output.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    multiprocessing.set_start_method(None, force=True)
    try:
        main(arguments)
    except BaseException as error:
        traceback.print_exc()
        sys.last_exc = error
        raise
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()


def printed_by(folder: Path, arguments: Sequence[str]) -> str:
    output = folder / "printed.txt"
    process = multiprocessing.get_context("forkserver").Process(target=run_in, args=(folder, arguments, output))
    process.start()
    process.join(timeout=300)
    if process.is_alive():
        process.kill()
    text = output.read_text()
    assert process.exitcode == 0, text[-3000:]
    return text


def export(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, torch.Tensor]:
    main(arguments)
    assert "tensors written to" in capsys.readouterr().out
    return load_file(f"{arguments[2]}/model.safetensors")


@pytest.mark.hugging_face
def test_projector_and_then_everything_is_trained_and_answers_in_transformers(
    rank_pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from examples.llava import answer, make_tiny

    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", MAKE[2:])
    make_tiny.main()
    source = load_file("data/tiny_llava/model/model.safetensors")

    # A few steps show that the projector alone is trained.
    printed_by(tmp_path, [*STAGE_1[1:], "--trainer.max_steps=4"])
    first = EXPORT[2].replace("stage2", "stage1")
    stage_1 = export(["export-hf", first, "one"], capsys)
    changed = {name for name in source if not torch.equal(source[name], stage_1[name])}
    assert changed == {name for name in source if "multi_modal_projector" in name}

    printed = printed_by(tmp_path, STAGE_2[1:])
    (table,) = (block.text for block in blocks_of(GUIDE, "text") if "left out:" in block.text)
    rows = [line.split() for line in table.splitlines() if "init_from" in line]
    assert len(rows) == 5
    assert all(row in [line.split() for line in printed.splitlines()] for row in rows)
    assert "left out: vision_tower." in printed  # whose names are those of the version of transformers
    manifest = read_manifest(Path(EXPORT[2]))
    assert (manifest["step"], manifest["epoch"]) == (32, 0)
    stage_2 = export(EXPORT[1:], capsys)
    unused = {name for name in source if ".layers.2." in name and "vision" in name} | {
        name for name in source if "post_layernorm" in name
    }
    assert {name for name in source if torch.equal(source[name], stage_2[name])} == unused
    files = sorted(path.name for path in Path("data/tiny_llava/model").iterdir())
    assert sorted(path.name for path in Path(EXPORT[3]).iterdir()) == files

    for line in Path("data/tiny_llava/val.jsonl").read_text().splitlines()[:4]:
        record = json.loads(line)
        monkeypatch.setattr(sys, "argv", ["answer", ANSWER[3], f"data/tiny_llava/{record['image']}", ANSWER[5]])
        answer.main()
        assert capsys.readouterr().out.strip() == record["conversations"][1]["value"]

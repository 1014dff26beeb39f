"""Pieces of tensors and directories of checkpoints, without a model."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lightning_mimo.checkpoint import tools
from lightning_mimo.checkpoint.directory import MANIFEST, publish, read_manifest, unfinished, write_json
from lightning_mimo.checkpoint.shards import ShardSpec, cut, join
from lightning_mimo.commands.cli import main
from lightning_mimo.errors import CheckpointError


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 3),
    dim=st.integers(0, 1),
    stride=st.integers(1, 2),
    tp_size=st.integers(1, 3),
    runs=st.integers(1, 4),
    twice=st.booleans(),
)
def test_pieces_of_any_cut_join_to_the_whole(rows, columns, dim, stride, tp_size, runs, twice) -> None:
    shape = [rows, columns]
    shape[dim] *= stride * tp_size
    whole = torch.arange(rows * columns * stride * tp_size).reshape(shape)
    shards = []
    numbers = whole.numel() // tp_size
    borders = [numbers * i // runs for i in range(runs + 1)]
    for tp_rank in range(tp_size):
        for start, stop in pairwise(borders):
            if stop > start:
                spec = ShardSpec(
                    shape=tuple(shape), dim=dim, stride=stride, tp_rank=tp_rank, tp_size=tp_size, start=start, stop=stop
                )
                shards.append((spec, cut(whole, spec)))
    assert torch.equal(join(shards[::-1] + shards[:1] * twice), whole)


def test_missing_piece_is_an_error() -> None:
    spec = ShardSpec(shape=(4,), start=0, stop=2)
    with pytest.raises(ValueError, match="only 2 of 4 elements of a shard were found"):
        join([(spec, torch.zeros(2))])


def checkpoint_at(path: Path, step: int) -> None:
    """The smallest complete checkpoint, moved to its final path."""
    unfinished(path).mkdir(parents=True)
    write_json(unfinished(path) / MANIFEST, {"format": 1, "step": step})
    publish(path)


def test_new_checkpoint_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for step in (1, 2):
        checkpoint_at(path, step)
        assert read_manifest(path)["step"] == step
        assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_new_checkpoint_takes_the_place_of_a_link(tmp_path: Path) -> None:
    checkpoint_at(tmp_path / "step=1.ckpt", 1)
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    checkpoint_at(tmp_path / "last.ckpt", 2)
    assert read_manifest(tmp_path / "last.ckpt")["step"] == 2
    assert read_manifest(tmp_path / "step=1.ckpt")["step"] == 1


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.ckpt is not a checkpoint.*there is no such directory"):
        read_manifest(tmp_path / "nothing.ckpt")
    (tmp_path / "empty.ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"empty\.ckpt is not a checkpoint.*it has no checkpoint\.json"):
        read_manifest(tmp_path / "empty.ckpt")
    unfinished(tmp_path / "half.ckpt").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"it was not written completely"):
        read_manifest(unfinished(tmp_path / "half.ckpt"))
    (tmp_path / "empty.ckpt" / MANIFEST).write_text('{"format": 7, "lightning_mimo": "9.0"}')
    with pytest.raises(CheckpointError, match=r"has format 7, but this version .* reads format 1.*by version 9\.0"):
        read_manifest(tmp_path / "empty.ckpt")


def weights_file(folder: Path) -> Path:
    tensors = {"images.a": torch.arange(6.0).reshape(2, 3), "language.b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def test_weights_go_in_and_come_out_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "in.ckpt", tmp_path / "out.safetensors"
    main(["checkpoint", "import", str(weights_file(tmp_path)), str(path)])
    main(["checkpoint", "export", str(path), str(out)])
    main(["checkpoint", "inspect", str(path)])
    printed = capsys.readouterr().out
    assert "2 parameters, 10 elements:\n  images.a    2x3\n  language.b  4" in printed
    assert "complete, 3 files" in printed and "weights only" in printed
    before, after = load_file(tmp_path / "weights.safetensors"), load_file(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_damaged_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.ckpt"
    tools.import_weights(weights_file(tmp_path), path)
    file = path / "images-rank00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "DAMAGED" in tools.inspect(path) and "images-rank00000.safetensors has" in tools.inspect(path)
    with pytest.raises(SystemExit):
        main(["checkpoint", "export", str(path), str(tmp_path / "out.safetensors")])
    error = capsys.readouterr().err
    assert "is damaged: images-rank00000.safetensors has" in error and error.count("\n") == 1
    file.unlink()
    assert "images-rank00000.safetensors is missing" in tools.inspect(path)


def test_tool_says_how_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["checkpoint", "export", "only_one"])
    assert "write: checkpoint inspect PATH, checkpoint export PATH OUT.safetensors" in capsys.readouterr().err


def test_tool_prints_no_warnings_and_may_be_cut_off_by_head(tmp_path: Path) -> None:
    path = tmp_path / "in.ckpt"
    tools.import_weights(weights_file(tmp_path), path)
    command = [sys.executable, "-m", "lightning_mimo", "checkpoint", "inspect", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # as `head` does after its last line
        error = process.stderr.read()
    assert process.returncode == 141
    assert "Warning" not in error
    assert "Error" not in error

"""Pieces of tensors and directories of checkpoints, without a model."""

from __future__ import annotations

import os
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
    main_fails(["checkpoint", "inspect", str(path)])
    printed = capsys.readouterr()
    assert "DAMAGED" in printed.out and "images-rank00000.safetensors has" in printed.out
    assert f"error: {path} is damaged: images-rank00000.safetensors has" in printed.err
    main_fails(["checkpoint", "export", str(path), str(tmp_path / "out.safetensors")])
    error = capsys.readouterr().err
    assert "is damaged: images-rank00000.safetensors has" in error and error.count("\n") == 1
    file.unlink()
    assert tools.inspect(path)[1] == "images-rank00000.safetensors is missing"
    os.mkfifo(file)
    assert tools.inspect(path)[1] == "images-rank00000.safetensors is missing, or not a regular file"


def main_fails(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


# ---- import and export write nothing but what was asked for


@pytest.mark.parametrize(
    "name", ["/tmp/lightning-mimo-outside/language.weight", "../language.weight", "language", "a b.weight", ".weight"]
)
def test_import_refuses_what_is_no_name_of_a_parameter(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({name: torch.ones(2)}, tmp_path / "weights.safetensors")
    main_fails(["checkpoint", "import", str(tmp_path / "weights.safetensors"), str(tmp_path / "in.ckpt")])
    assert f"{name!r} is not the name of a parameter" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.safetensors"]
    assert not Path("/tmp/lightning-mimo-outside").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "weights.safetensors has no tensors"),
        (b"no safetensors", "weights.safetensors is not a safetensors file"),
        (None, "weights.safetensors is not a safetensors file: it is not there"),
        ("fifo", "weights.safetensors is not a safetensors file: it is not a file"),
    ],
    ids=["empty", "other", "missing", "fifo"],
)
def test_import_names_what_cannot_be_imported(content: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    if content == "fifo":
        os.mkfifo(file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, dict):
        save_file(content, file)
    with pytest.raises(CheckpointError, match=message):
        tools.import_weights(file, tmp_path / "in.ckpt")
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name][: content is not None]


@pytest.mark.parametrize("kind", ["file", "folder", "fifo", "device"])
def test_export_overwrites_nothing(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "in.ckpt", tmp_path / "out.safetensors"
    tools.import_weights(weights_file(tmp_path), path)
    {
        "file": lambda: out.write_text("mine"),
        "folder": out.mkdir,
        "fifo": lambda: os.mkfifo(out),
        "device": lambda: out.symlink_to("/dev/null"),
    }[kind]()
    before = out.lstat()
    main_fails(["checkpoint", "export", str(path), str(out)])
    assert capsys.readouterr().err == (
        f"lightning-mimo: error: {out} already exists; remove it first, or choose another name.\n"
    )
    assert (out.lstat().st_ino, out.lstat().st_mtime) == (before.st_ino, before.st_mtime)
    assert len(list(tmp_path.iterdir())) == 3


def test_export_into_a_folder_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tools.import_weights(weights_file(tmp_path), tmp_path / "in.ckpt")
    out = tmp_path / "no" / "out.safetensors"
    main_fails(["checkpoint", "export", str(tmp_path / "in.ckpt"), str(out)])
    assert f"error: {out} cannot be written: " in capsys.readouterr().err


def test_files_can_be_read_by_whoever_can_read_the_folder(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        tools.import_weights(weights_file(tmp_path), tmp_path / "in.ckpt")
        tools.export(tmp_path / "in.ckpt", tmp_path / "out.safetensors")
    finally:
        os.umask(before)
    files = [*(tmp_path / "in.ckpt").iterdir(), tmp_path / "out.safetensors"]
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in files} == {file.name: "0o640" for file in files}


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

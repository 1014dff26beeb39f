"""The manifest: every field is checked, and only what it lists is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_mimo.checkpoint import tools
from lightning_mimo.checkpoint.directory import MANIFEST, UNFINISHED, damaged_files, read_manifest
from lightning_mimo.checkpoint.manifest import manifest_text
from lightning_mimo.checkpoint.reader import CheckpointReader
from lightning_mimo.errors import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint with two modules."""
    tensors = {"images.a": torch.arange(6.0).reshape(2, 3), "language.b": torch.ones(4)}
    save_file(tensors, tmp_path / "weights.safetensors")
    tools.import_weights(tmp_path / "weights.safetensors", tmp_path / "some.ckpt")
    return tmp_path / "some.ckpt"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and give it the checksum that belongs to it."""
    manifest = read_manifest(path)
    change(manifest)
    (path / MANIFEST).write_text(manifest_text(manifest))


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.ckpt is not a checkpoint.*there is no such directory"):
        read_manifest(tmp_path / "nothing.ckpt")
    (tmp_path / "file.ckpt").write_text("")
    with pytest.raises(CheckpointError, match=r"file\.ckpt is not a checkpoint.*it is not a directory"):
        read_manifest(tmp_path / "file.ckpt")
    (tmp_path / "empty.ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"empty\.ckpt is not a checkpoint.*it has no checkpoint\.json"):
        read_manifest(tmp_path / "empty.ckpt")
    half = tmp_path / UNFINISHED / "half.ckpt.1234"
    half.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"it was not written completely"):
        read_manifest(half)
    (tmp_path / "empty.ckpt" / MANIFEST).write_text('{"format": 7, "lightning_mimo": "9.0"}')
    with pytest.raises(CheckpointError, match=r"has format 7, but this version .* reads formats 1 to 2.*version 9\.0"):
        read_manifest(tmp_path / "empty.ckpt")


def test_manifest_of_the_former_format_is_read(path: Path) -> None:
    content = json.loads((path / MANIFEST).read_text())
    del content["crc32"]
    (path / MANIFEST).write_text(json.dumps({**content, "format": 1}))
    assert read_manifest(path)["files"] == content["files"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "checkpoint.json is damaged"),
        ("[" * 100_000, "checkpoint.json is damaged"),
        ("[]", "must be a JSON object"),
        ("\xff", "checkpoint.json is damaged"),
        ('{"format": NaN}', "NaN is not a number of JSON"),
        ('{"format": 2, "format": 2}', "a key occurs twice"),
        ('{"format": true}', "has format True"),
        ('{"format": 2}', "its checksum is [0-9]+, but it was written with None"),
        ('{"format": 1, "crc32": 1}', "it has no 'epoch'"),
    ],
)
def test_text_that_is_no_manifest_is_refused(path: Path, text: str, message: str) -> None:
    (path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(path)


def test_manifest_of_any_size_is_not_read_into_memory(path: Path) -> None:
    os.truncate(path / MANIFEST, 1 << 40)  # sparse
    with pytest.raises(CheckpointError, match=r"checkpoint.json is damaged: it has [\d,]+ bytes, too many"):
        read_manifest(path)


def test_any_changed_field_breaks_the_checksum(path: Path) -> None:
    content = json.loads((path / MANIFEST).read_text())
    for field in sorted(set(content) - {"format"}):
        changed = {**content, field: 5 if field != "step" else 6}
        (path / MANIFEST).write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=r"its checksum is \d+, but it was written with \d+"):
            read_manifest(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("step", -1, "step is -1, but must be a whole number of at least 0"),
        ("step", True, "step is True"),
        ("epoch", 1.0, "epoch is 1.0"),
        ("epoch", 2**63, "epoch is 9223372036854775808"),
        ("weights_only", 1, "weights_only is 1, but must be true or false"),
        ("weights_only", False, "weights_only is false, but layout or position is missing"),
        ("lightning_mimo", None, "lightning_mimo is None, but must be a version"),
        ("world_size", "4", "world_size is '4'"),
        ("position", {"seed": 1}, "position is .*, but must be null or a position"),
        ("position", {"seed": -1, "global_batch_size": 1, "samples": 1, "batches": 1}, "position is"),
        ("layout", {"modules": {}}, "layout is"),
        ("layout", {"colocated": True, "modules": {}}, "parameters has module '(images|language)', which is not in"),
        ("files", {}, "files has no 'trainer.pt'"),
        ("files", [], r"files is \[\], but must be"),
        ("files", {"/etc/passwd": {"bytes": 1, "crc32": 1}}, "files is .*, but must be"),
        ("files", {"../language-rank00000.safetensors": {"bytes": 1, "crc32": 1}}, "files is .*, but must be"),
        ("files", {"trainer.pt": {"bytes": -1, "crc32": 1}}, "files is .*, but must be"),
        ("files", {"trainer.pt": {"bytes": 1, "crc32": 2**32}}, "files is .*, but must be"),
        ("files", {"trainer.pt": {"bytes": 1, "crc32": 1}}, "files has no file of module 'images'"),
        ("parameters", {}, "files has a file of '(images|language)', but parameters has none of it"),
        ("parameters", {"images.a": [2, -3]}, "parameters is .*, but must be"),
        ("parameters", {"images.a": 6}, "parameters is .*, but must be"),
        ("parameters", {"a b.c": [6]}, "parameters is .*, but must be"),
        ("more", 1, "it has 'more', which is not of this format"),
    ],
)
def test_every_field_is_checked(path: Path, field: str, value: object, message: str) -> None:
    edit(path, lambda manifest: manifest.update({field: value}))
    with pytest.raises(CheckpointError, match=f"checkpoint.json is damaged: {message}"):
        read_manifest(path)


def test_missing_field_is_named(path: Path) -> None:
    edit(path, lambda manifest: manifest.pop("step"))
    with pytest.raises(CheckpointError, match="it has no 'step'"):
        read_manifest(path)


def problems(path: Path) -> list[str]:
    return list(damaged_files(path, read_manifest(path), rank=0, ranks=1))


def test_only_what_the_manifest_lists_is_read(path: Path) -> None:
    ones = {"language.b/weight": torch.full((4,), 9.0)}
    spec = {"shape": [4], "dim": 0, "stride": 1, "tp_rank": 0, "tp_size": 1, "start": 0, "stop": 4}
    metadata = {"places": json.dumps({"language.b/weight": spec})}
    save_file(ones, path / "language-rank99999.safetensors", metadata=metadata)
    (path / ".DS_Store").write_text("of a file manager")
    assert problems(path) == [
        "it contains 'language-rank99999.safetensors', which its manifest does not list; move it elsewhere"
    ]
    with CheckpointReader(path, ["language"]) as reader:
        assert torch.equal(reader.whole("language.b", "weight"), torch.ones(4))


def test_file_of_another_size_is_not_read(path: Path) -> None:
    file = path / "language-rank00000.safetensors"
    size = file.stat().st_size
    os.truncate(file, 1 << 40)  # sparse: reading it would take hours
    assert problems(path) == [f"{file.name} has {1 << 40} bytes, but was written with {size} bytes"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [5]}, "5, but|has the shape"),
        ({"stop": 3}, "its header says otherwise"),
        ({"stop": 5}, "does not describe a shard"),
        ({"start": -1}, "does not describe a shard"),
        ({"start": True}, "does not describe a shard"),
        ({"tp_rank": 1}, "does not describe a shard"),
        ({"dim": 1}, "does not describe a shard"),
        ({"stride": 0}, "does not describe a shard"),
        ({"tp_size": 3}, "does not describe a shard"),
        ({"tp_size": 0}, "does not describe a shard"),
        ({"more": 1}, "does not describe a shard"),
        ({"shape": 4}, "does not describe a shard"),
    ],
    ids=str,
)
def test_header_of_a_file_is_checked(path: Path, change: dict[str, Any], message: str) -> None:
    spec = {"shape": [4], "dim": 0, "stride": 1, "tp_rank": 0, "tp_size": 1, "start": 0, "stop": 4, **change}
    tensors, metadata = {"language.b/weight": torch.ones(4)}, {"places": json.dumps({"language.b/weight": spec})}
    save_file(tensors, path / "language-rank00000.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(path, ["language"])


@pytest.mark.parametrize(
    ("tensors", "specs", "message"),
    [
        ({}, {}, r"language.b \(weight\): none of its shards was found"),
        ({"language.c/weight": 4}, {"language.c/weight": 4}, "it has 'language.c', which the manifest does not list"),
        ({"language.b/weight": 4}, {}, "its header does not describe its tensors"),
        ({"language.b/weight": 3}, {"language.b/weight": 3}, "only 3 of 4 elements of a shard were found"),
    ],
    ids=["none", "unknown", "undescribed", "partial"],
)
def test_tensors_of_a_file_are_those_of_the_manifest(
    path: Path, tensors: dict[str, int], specs: dict[str, int], message: str
) -> None:
    described = {
        key: {"shape": [4], "dim": 0, "stride": 1, "tp_rank": 0, "tp_size": 1, "start": 0, "stop": stop}
        for key, stop in specs.items()
    }
    file = path / "language-rank00000.safetensors"
    save_file({key: torch.ones(size) for key, size in tensors.items()}, file, {"places": json.dumps(described)})
    with pytest.raises(CheckpointError, match=message), CheckpointReader(path, ["language"]) as reader:
        reader.whole("language.b", "weight")

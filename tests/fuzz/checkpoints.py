"""Damaged checkpoints: bytes of files, entries of JSON, tensors and headers, and what else may lie in a directory."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_mimo.checkpoint.directory import MANIFEST, TRAINER
from tests.support.checkpoint_edits import edit_manifest, edit_shards, edit_trainer, sign

_VALUES: tuple[Any, ...] = (
    *(None, True, "", "x", "/etc/passwd", -1, 0, 1, 2, 10**6, 2**63, 10**30, 0.5, float("inf"), [], {}, [1], {"a": 1}),
)


def damage(path: Path, seed: int) -> str:
    """Damage a checkpoint in one way of many; the same one for the same seed. Returns what was done."""
    draw = random.Random(seed)
    return draw.choices([how for how, _ in _WAYS], weights=[weight for _, weight in _WAYS])[0](path, draw)


def _file(path: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path.iterdir()))


def _shard_file(path: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path.glob("*.safetensors")))


def _flip_bytes(path: Path, draw: random.Random) -> str:
    file = _file(path, draw)
    data = bytearray(file.read_bytes())
    places = [draw.randrange(len(data)) for _ in range(draw.choice((1, 1, 2, 8)))]
    for place in places:
        data[place] ^= draw.randrange(1, 256)
    file.write_bytes(data)
    return f"{file.name}: bytes {places} changed"


def _flip_and_sign(path: Path, draw: random.Random) -> str:
    """Change a byte of a header or of Lightning's state, and sign it."""
    file = path / TRAINER if draw.random() < 0.5 else _shard_file(path, draw)
    data = bytearray(file.read_bytes())
    end = len(data) if file.name == TRAINER else 8 + int.from_bytes(data[:8], "little")
    place = draw.randrange(end)
    data[place] ^= draw.randrange(1, 256)
    file.write_bytes(data)
    sign(path, file.name)
    return f"{file.name}: byte {place} changed and signed"


def _cut(path: Path, draw: random.Random) -> str:
    file = _file(path, draw)
    size = draw.randrange(file.stat().st_size)
    os.truncate(file, size)
    if draw.random() < 0.5 and file.name != MANIFEST:
        sign(path, file.name)
        return f"{file.name}: cut to {size} bytes and signed"
    return f"{file.name}: cut to {size} bytes"


def _grow(path: Path, draw: random.Random) -> str:
    file = _file(path, draw)
    os.truncate(file, draw.choice((file.stat().st_size + 1, 1 << 30, 1 << 40)))
    return f"{file.name}: grown to {file.stat().st_size} bytes"


def _replace_file(path: Path, draw: random.Random) -> str:
    file, other = _file(path, draw), _file(path, draw)
    kind = draw.choice(("missing", "empty", "folder", "fifo", "device", "link", "other"))
    data = other.read_bytes()
    file.unlink()
    {
        "missing": lambda: None,
        "empty": file.touch,
        "folder": file.mkdir,
        "fifo": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/zero"),
        "link": lambda: file.symlink_to(file.name),
        "other": lambda: file.write_bytes(data),
    }[kind]()
    return f"{file.name}: {kind}" + (f" {other.name}" if kind == "other" else "")


def _add_file(path: Path, draw: random.Random) -> str:
    name = draw.choice(("language-rank99999.safetensors", "notes.txt", "images-rank00000.safetensors.part", "sub"))
    if name == "sub":
        (path / name).mkdir()
    else:
        shutil.copy(_shard_file(path, draw), path / name)
    return f"{name} added"


def _places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    found = []
    for key, value in entries:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += _places(value, (*path, key))
    return found


def _change_entry(content: Any, draw: random.Random) -> str:
    """Change, remove or add an entry somewhere in nested dictionaries and lists."""
    *outer, last = draw.choice(_places(content))
    for key in outer:
        content = content[key]
    how = draw.random()
    if how < 0.2 and isinstance(content, dict):
        del content[last]
        return f"{[*outer, last]} removed"
    if how < 0.3 and isinstance(content, dict):
        content["more"] = 1
        return f"{outer} has one more"
    value = draw.choice(_VALUES)
    content[last] = value
    return f"{[*outer, last]} = {value!r}"


def _edit_manifest(path: Path, draw: random.Random) -> str:
    what = ""

    def change(manifest: Any) -> None:
        nonlocal what
        what = _change_entry(manifest, draw)

    edit_manifest(path, change)
    return f"{MANIFEST}: {what}, signed"


def _edit_manifest_text(path: Path, draw: random.Random) -> str:
    content = json.loads((path / MANIFEST).read_text())
    what = _change_entry(content, draw)
    (path / MANIFEST).write_text(json.dumps(content))
    return f"{MANIFEST}: {what}"


def _edit_trainer(path: Path, draw: random.Random) -> str:
    what = ""

    def change(content: dict[str, Any]) -> None:
        nonlocal what
        own = {key: value for key, value in content.items() if key in ("optimizer_states", "lr_schedulers", "loops")}
        what = _change_entry(own if draw.random() < 0.7 else content, draw)

    edit_trainer(path, change)
    return f"{TRAINER}: {what}, signed"


def _edit_header(path: Path, draw: random.Random) -> str:
    file, what = _shard_file(path, draw), ""

    def change(tensors: Any, specs: Any) -> None:
        nonlocal what
        key = draw.choice(sorted(specs))
        what = f"{key}: {_change_entry(specs[key], draw)}"

    edit_shards(path, file.name, change)
    return f"{file.name}: {what}, signed"


def _edit_tensors(path: Path, draw: random.Random) -> str:
    file, what = _shard_file(path, draw), ""

    def change(tensors: Any, specs: Any) -> None:
        nonlocal what
        key = draw.choice(sorted(tensors))
        how = draw.choice(("removed", "shorter", "integers", "renamed", "two-dimensional", "all moments removed"))
        what = f"{key} {how}"
        if how == "removed":
            del tensors[key], specs[key]
        elif how == "shorter":
            tensors[key] = tensors[key][:-1].clone()
            specs[key]["stop"] -= 1
        elif how == "integers":
            tensors[key] = tensors[key].to(torch.int16)
        elif how == "renamed":
            tensors[f"{key}x"], specs[f"{key}x"] = tensors.pop(key), specs.pop(key)
        elif how == "two-dimensional":
            tensors[key] = tensors[key][None].clone()
        else:
            for each in [each for each in tensors if each.endswith(("exp_avg", "exp_avg_sq", "step"))]:
                del tensors[each], specs[each]

    edit_shards(path, file.name, change)
    return f"{file.name}: {what}, signed"


_WAYS: tuple[tuple[Callable[[Path, random.Random], str], int], ...] = (
    (_flip_bytes, 4),
    (_flip_and_sign, 4),
    (_cut, 2),
    (_grow, 1),
    (_replace_file, 3),
    (_add_file, 1),
    (_edit_manifest, 5),
    (_edit_manifest_text, 2),
    (_edit_trainer, 4),
    (_edit_header, 3),
    (_edit_tensors, 3),
)

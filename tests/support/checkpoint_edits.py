"""Edits checkpoints as a careful forger would: sizes and checksums fit what was changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_mimo.checkpoint.directory import MANIFEST, TRAINER, describe_file, read_manifest
from lightning_mimo.checkpoint.manifest import manifest_text

Tensors = dict[str, torch.Tensor]
Specs = dict[str, dict[str, Any]]


def edit_manifest(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the manifest of a checkpoint."""
    manifest = read_manifest(path)
    change(manifest)
    (path / MANIFEST).write_text(manifest_text(manifest))


def sign(path: Path, name: str) -> None:
    """Give a file of a checkpoint the size and checksum in the manifest that it has now."""
    edit_manifest(path, lambda manifest: manifest["files"].update({name: describe_file(path / name)}))


def edit_trainer(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change Lightning's state; what the change returns, if anything, takes its place."""
    content = torch.load(path / TRAINER, weights_only=True)
    replaced = change(content)
    torch.save(content if replaced is None else replaced, path / TRAINER)
    sign(path, TRAINER)


def edit_shards(path: Path, name: str, change: Callable[[Tensors, Specs], Any]) -> None:
    """Change the tensors of a file and what its header says of them."""
    with safe_open(path / name, framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dictionary)
        specs = json.loads(file.metadata()["places"])
    change(tensors, specs)
    save_file(tensors, path / name, metadata={"places": json.dumps(specs)})
    sign(path, name)

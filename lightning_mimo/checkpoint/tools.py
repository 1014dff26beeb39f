"""Inspects a checkpoint, exports its weights to one safetensors file, and imports weights from one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_mimo.checkpoint.directory import (
    FORMAT,
    MANIFEST,
    TRAINER,
    damaged_files,
    describe_file,
    publish,
    read_manifest,
    unfinished,
    write_json,
)
from lightning_mimo.checkpoint.reader import CheckpointReader, file_name, write_shards
from lightning_mimo.checkpoint.shards import MAIN, WEIGHT, ShardSpec
from lightning_mimo.checkpoint.state import TensorShard
from lightning_mimo.errors import CheckpointError


def inspect(path: Path) -> str:
    """Describe a checkpoint as text: layout, step, version, parameters, shapes and damaged files.

    Raises:
        CheckpointError: if the path is not a complete checkpoint.
    """
    manifest = read_manifest(path)
    problems = list(damaged_files(path, manifest, rank=0, ranks=1))
    size = sum(file["bytes"] for file in manifest["files"].values())
    lines = [
        f"{path}: {'DAMAGED' if problems else 'complete'}, {len(manifest['files'])} files, {size:,} bytes",
        *(f"  {problem}" for problem in problems),
        f"step {manifest['step']}, epoch {manifest['epoch']}, "
        f"{'weights only' if manifest['weights_only'] else 'weights and optimizer state'}, "
        f"lightning-mimo {manifest['lightning_mimo']}",
    ]
    if manifest["layout"] is not None:
        placed = "colocated" if manifest["layout"]["colocated"] else "on separate ranks"
        lines.append(f"written by {manifest['world_size']} ranks, modules {placed}:")
        for name, sizes in manifest["layout"]["modules"].items():
            first, stop = sizes["ranks"]
            axes = " ".join(f"{axis}={size}" for axis, size in sizes.items() if axis != "ranks")
            lines.append(f"  {name}: ranks {first}-{stop - 1}, {axes}")
    parameters = manifest["parameters"]
    total = sum(torch.Size(shape).numel() for shape in parameters.values())
    lines.append(f"{len(parameters)} parameters, {total:,} elements:")
    width = max(map(len, parameters), default=0)
    lines += [f"  {name:{width}}  {'x'.join(map(str, shape))}" for name, shape in sorted(parameters.items())]
    return "\n".join(lines)


def export(path: Path, out: Path) -> int:
    """Write all weights to one safetensors file under their global names.

    In mixed precision the optimizer's float32 copies are written.

    Returns:
        The number of parameters.

    Raises:
        CheckpointError: if the path is not a complete checkpoint, or a file is damaged.
    """
    manifest = read_manifest(path)
    if problems := list(damaged_files(path, manifest, rank=0, ranks=1)):
        raise CheckpointError(f"{path} is damaged: {problems[0]}.")
    with CheckpointReader(path, modules_in(manifest["parameters"])) as reader:
        tensors = {
            name: reader.whole(name, MAIN if MAIN in reader.kinds(name) else WEIGHT).contiguous()
            for name in manifest["parameters"]
        }
    save_file(tensors, out, metadata={"format": "pt", "step": str(manifest["step"])})
    return len(tensors)


def import_weights(source: Path, path: Path) -> int:
    """Create a weights-only checkpoint from a safetensors file with weights under their global names.

    The checkpoint can be used to validate, test and predict. Training cannot start from it.

    Returns:
        The number of parameters.

    Raises:
        CheckpointError: if the file is not a safetensors file, or the checkpoint exists.
    """
    if path.exists():
        raise CheckpointError(f"{path} already exists; remove it first, or choose another name.")
    directory = unfinished(path)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    shards: dict[str, list[TensorShard]] = {}
    try:
        with safe_open(source, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                tensor = file.get_tensor(name)
                spec = ShardSpec(shape=tuple(tensor.shape), stop=tensor.numel())
                shard = TensorShard(name=name, kind=WEIGHT, spec=spec, tensor=tensor.reshape(-1))
                shards.setdefault(name.partition(".")[0], []).append(shard)
    except Exception as error:
        raise CheckpointError(f"{source} is not a safetensors file: {error}.") from error
    for module, own in shards.items():
        write_shards(directory / file_name(module, 0), own)
    # The entries that Lightning requires before it validates.
    trainer = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": version("lightning"), "state_dict": {}}
    torch.save({**trainer, "loops": None}, directory / TRAINER)
    parameters = {shard.name: list(shard.spec.shape) for own in shards.values() for shard in own}
    manifest: Mapping[str, Any] = {
        "format": FORMAT,
        "lightning_mimo": f"imported from {source.name}",
        "layout": None,
        "step": 0,
        "epoch": 0,
        "weights_only": True,
        "position": None,
        "world_size": 0,
        "files": {file.name: describe_file(file) for file in sorted(directory.iterdir())},
        "parameters": parameters,
    }
    write_json(directory / MANIFEST, manifest)
    publish(path)
    return len(parameters)


def modules_in(parameters: Mapping[str, Any]) -> list[str]:
    """Names of the modules that contain parameters with these global names, sorted."""
    return sorted({name.partition(".")[0] for name in parameters})


def as_json(path: Path) -> str:
    """The manifest of a checkpoint as JSON text."""
    return json.dumps(read_manifest(path), indent=1)

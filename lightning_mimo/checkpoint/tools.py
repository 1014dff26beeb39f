"""Inspects a checkpoint, exports its weights to one safetensors file, and imports weights from one."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_mimo.checkpoint.directory import (
    TRAINER,
    damaged_files,
    describe_file,
    file_name,
    flush,
    read_manifest,
    remove_directory,
    write_manifest,
)
from lightning_mimo.checkpoint.manifest import FORMAT, Manifest
from lightning_mimo.checkpoint.reader import CheckpointReader, write_shards
from lightning_mimo.checkpoint.replacement import before_replacement, make_unfinished, publish
from lightning_mimo.checkpoint.shards import MAIN, WEIGHT, ShardSpec
from lightning_mimo.checkpoint.state import TensorShard
from lightning_mimo.errors import CheckpointError


def inspect(path: Path) -> tuple[str, str | None]:
    """Describe a checkpoint as text: layout, step, version, parameters, shapes and damaged files.

    Returns:
        The text, and the first problem if the checkpoint is damaged.

    Raises:
        CheckpointError: if the path is not a complete checkpoint.
    """
    manifest, problems = _read(path)
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
    return "\n".join(lines), problems[0] if problems else None


def _read(path: Path) -> tuple[Manifest, list[str]]:
    """Read a manifest, and find the problems of all files."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        if not os.path.lexists(path) and (before := before_replacement(path)).is_dir():
            raise CheckpointError(
                f"{error} A save was interrupted while it replaced it; the checkpoint before that is {before.name}."
            ) from error
        raise
    try:
        problems = list(damaged_files(path, manifest, rank=0, ranks=1))
        if not problems:
            with CheckpointReader(path, modules_in(manifest["parameters"]), manifest) as reader:
                for name in manifest["parameters"]:
                    reader.check(name, WEIGHT)
    except (CheckpointError, OSError) as error:
        problems = [str(error).rstrip(".")]
    return manifest, problems


def export(path: Path, out: Path) -> int:
    """Write all weights to one safetensors file under their global names.

    In mixed precision the optimizer's float32 copies are written.

    Args:
        path: checkpoint directory.
        out: is made; must not exist.

    Returns:
        The number of parameters.

    Raises:
        CheckpointError: if the path is not a complete checkpoint, a file is damaged, or ``out`` exists or cannot be
            written.
    """
    if os.path.lexists(out):
        raise CheckpointError(f"{out} already exists; remove it first, or choose another name.")
    manifest, problems = _read(path)
    if problems:
        raise CheckpointError(f"{path} is damaged: {problems[0]}.")
    with CheckpointReader(path, modules_in(manifest["parameters"]), manifest) as reader:
        tensors = {
            name: reader.whole(name, MAIN if MAIN in reader.kinds(name) else WEIGHT).contiguous()
            for name in manifest["parameters"]
        }
    unfinished = out.with_name(f"{out.name[:50]}.{secrets.token_hex(4)}.part")
    try:
        unfinished.touch(exist_ok=False)
        mode = unfinished.stat().st_mode
        save_file(tensors, unfinished, metadata={"format": "pt", "step": str(manifest["step"])})
        unfinished.chmod(mode & 0o777)  # safetensors creates its files for their owner only
        flush(unfinished)
        unfinished.rename(out)
    except Exception as error:
        unfinished.unlink(missing_ok=True)
        raise CheckpointError(f"{out} cannot be written: {error}.") from error
    return len(tensors)


def import_weights(source: Path, path: Path) -> int:
    """Create a weights-only checkpoint from a safetensors file with weights under their global names.

    The checkpoint can be used to validate, test and predict. Training cannot start from it.

    Args:
        source: safetensors file with names that begin with a module's name: ``language.decoder.….weight``.
        path: is made; must not exist.

    Returns:
        The number of parameters.

    Raises:
        CheckpointError: if the file is not a safetensors file, a name in it is not that of a parameter, or the
            checkpoint exists or cannot be written.
    """
    if os.path.lexists(path):
        raise CheckpointError(f"{path} already exists; remove it first, or choose another name.")
    shards = _shards_from(source)
    directory: Path | None = None
    try:
        directory = make_unfinished(path)
        _write_imported(directory, shards, source)
        publish(directory, path)
    except OSError as error:
        if directory is not None and directory.is_dir():
            remove_directory(directory)
        raise CheckpointError(f"{path} cannot be written: {error}.") from error
    return sum(map(len, shards.values()))


def _shards_from(source: Path) -> dict[str, list[TensorShard]]:
    """Read the tensors of a safetensors file, by module. They are memory-mapped."""
    if not source.is_file():
        what = "not a file" if os.path.lexists(source) else "not there"
        raise CheckpointError(f"{source} is not a safetensors file: it is {what}.")
    shards: dict[str, list[TensorShard]] = {}
    try:
        with safe_open(source, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                _check_name(source, name)
                tensor = file.get_tensor(name)
                spec = ShardSpec(shape=tuple(tensor.shape), stop=tensor.numel())
                shard = TensorShard(name=name, kind=WEIGHT, spec=spec, tensor=tensor.reshape(-1))
                shards.setdefault(name.partition(".")[0], []).append(shard)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{source} is not a safetensors file: {error}.") from error
    if not shards:
        raise CheckpointError(f"{source} has no tensors.")
    return shards


def _check_name(source: Path, name: str) -> None:
    module, _, parameter = name.partition(".")
    if not module.isidentifier() or not parameter or not name.isprintable() or "/" in name:
        raise CheckpointError(
            f"{source}: {name!r} is not the name of a parameter; names begin with that of a module, as in "
            f"'language.decoder.final_layernorm.weight'."
        )


def _write_imported(directory: Path, shards: Mapping[str, list[TensorShard]], source: Path) -> None:
    for module, own in shards.items():
        write_shards(directory / file_name(module, 0), own)
    # The entries that Lightning requires before it validates.
    trainer = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": version("lightning"), "state_dict": {}}
    torch.save({**trainer, "loops": None}, directory / TRAINER)
    written = [directory / TRAINER, *(directory / file_name(module, 0) for module in shards)]
    for file in written:
        file.chmod((directory / TRAINER).stat().st_mode & 0o777)
        flush(file)
    manifest: Manifest = {
        "format": FORMAT,
        "lightning_mimo": f"imported from {source.name}",
        "layout": None,
        "step": 0,
        "epoch": 0,
        "weights_only": True,
        "position": None,
        "world_size": 0,
        "files": {file.name: describe_file(file) for file in written},
        "parameters": {shard.name: list(shard.spec.shape) for own in shards.values() for shard in own},
    }
    write_manifest(directory, manifest)


def modules_in(parameters: Mapping[str, Any]) -> list[str]:
    """Names of the modules that contain parameters with these global names, sorted."""
    return sorted({name.partition(".")[0] for name in parameters})


def as_json(path: Path) -> str:
    """The manifest of a checkpoint as JSON text."""
    return json.dumps(read_manifest(path), indent=1)

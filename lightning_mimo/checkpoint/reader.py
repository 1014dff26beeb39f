"""Writes and reads the safetensors files of a checkpoint. Only the requested elements of a tensor are read."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_mimo.checkpoint.directory import module_of_file, read_manifest
from lightning_mimo.checkpoint.manifest import Manifest
from lightning_mimo.checkpoint.shards import WEIGHT, ShardSpec, check_coverage, cut, join
from lightning_mimo.checkpoint.state import TensorShard
from lightning_mimo.errors import CheckpointError

_SPECS = "places"  # key in the header of each file
GENERATOR = "generator"
"""Kind of the shards that hold states of random generators."""


def write_shards(path: Path, shards: Collection[TensorShard]) -> None:
    """Write shards to a file. Their tensors must be contiguous, on the CPU, and not share memory."""
    keys = [f"{shard.name}/{shard.kind}" for shard in shards]
    assert len(set(keys)) == len(keys), "a rank writes each tensor once"
    specs = {key: shard.spec.to_dict() for key, shard in zip(keys, shards, strict=True)}
    tensors = {key: shard.tensor for key, shard in zip(keys, shards, strict=True)}
    save_file(tensors, path, metadata={_SPECS: json.dumps(specs)})


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A shard in an open file: its key, its position in the full tensor, and its dtype as safetensors names it."""

    file: Any
    key: str
    spec: ShardSpec
    dtype: str


class CheckpointReader:
    """Reads tensors of selected modules from a checkpoint. Use it in a ``with`` statement."""

    def __init__(self, path: Path, modules: Collection[str], manifest: Manifest | None = None) -> None:
        """
        Args:
            path: checkpoint directory.
            modules: names of the modules whose files are opened.
            manifest: the manifest of the checkpoint, if it has been read already.

        Raises:
            CheckpointError: if a file that the manifest lists is damaged or does not belong to it.
        """
        self._open = ExitStack()
        self._found: dict[str, dict[str, list[_Stored]]] = defaultdict(lambda: defaultdict(list))
        manifest = read_manifest(path) if manifest is None else manifest
        try:
            for name in sorted(manifest["files"]):
                if module_of_file(name) in modules:
                    self._index(path / name, manifest)
        except BaseException:
            self._open.close()
            raise

    def _index(self, file: Path, manifest: Manifest) -> None:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, or not a regular file.")
        try:
            opened = self._open.enter_context(safe_open(file, framework="pt"))
            specs = json.loads((opened.metadata() or {})[_SPECS])
            if set(specs) != set(opened.keys()):
                raise ValueError("its header does not describe its tensors")
            for key, fields in specs.items():
                spec, stored = ShardSpec.from_dict(fields), opened.get_slice(key)
                if stored.get_shape() != [spec.stop - spec.start]:
                    raise ValueError(f"{key} has the shape {stored.get_shape()}, but its header says otherwise")
                name, _, kind = key.rpartition("/")
                _check_belongs(name, kind, spec, manifest)
                self._found[name][kind].append(_Stored(file=opened, key=key, spec=spec, dtype=stored.get_dtype()))
        except Exception as error:
            raise CheckpointError(f"{file} is damaged: {error}.") from error

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def names(self) -> Iterator[str]:
        """Global names of all parameters."""
        yield from self._found

    def kinds(self, name: str) -> set[str]:
        return set(self._found[name]) if name in self._found else set()

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        """Shape of the full, unsharded tensor."""
        return self._found[name][kind][0].spec.shape

    def dtype(self, name: str, kind: str) -> str:
        """Dtype as safetensors names it, such as ``F32``."""
        return self._found[name][kind][0].dtype

    def check(self, name: str, kind: str) -> None:
        """Check that the shards of a tensor cover it, and agree in how it is cut and in their dtype.

        Raises:
            CheckpointError: naming the tensor.
        """
        stored = self._found[name][kind] if kind in self.kinds(name) else []
        try:
            if len({each.dtype for each in stored}) > 1:
                raise CheckpointError("its shards have different dtypes")
            check_coverage([each.spec for each in stored])
        except CheckpointError as error:
            raise CheckpointError(f"{name} ({kind}): {str(error).rstrip('.')}.") from error

    def whole(self, name: str, kind: str) -> torch.Tensor:
        """Read a full tensor from all its shards.

        Raises:
            CheckpointError: if a shard is missing.
        """
        self.check(name, kind)
        return join((each.spec, each.file.get_tensor(each.key)) for each in self._found[name][kind])

    def read(self, name: str, kind: str, spec: ShardSpec) -> torch.Tensor:
        """Read the elements that a spec describes, flat, on the CPU.

        If the file has the same tensor-parallel shard, only the requested elements are read; otherwise the full tensor
        is read and cut.
        """
        runs, position = [], spec.start
        same = [each for each in self._found[name][kind] if each.spec.is_same_shard(spec)]
        for each in sorted(same, key=lambda each: each.spec.start):
            found = each.spec
            if found.start <= position < min(found.stop, spec.stop):
                stop = min(found.stop, spec.stop)
                runs.append(each.file.get_slice(each.key)[position - found.start : stop - found.start])
                position = stop
        if position == spec.stop and runs:
            return torch.cat(runs) if len(runs) > 1 else runs[0]
        return cut(self.whole(name, kind), spec)


def _check_belongs(name: str, kind: str, spec: ShardSpec, manifest: Manifest) -> None:
    """Raise a ValueError if the manifest has no such parameter, or one of another shape."""
    if kind == GENERATOR:
        return
    shape = manifest["parameters"].get(name)
    if shape is None:
        raise ValueError(f"it has {name!r}, which the manifest does not list")
    if list(spec.shape) != ([] if kind == "step" else shape):  # the step of an optimizer is a number
        raise ValueError(f"{name!r} has the shape {spec.shape}, but {tuple(shape)} in the manifest")


def parameters_in(shards: Mapping[str, Collection[TensorShard]]) -> dict[str, list[int]]:
    """Global parameter name -> shape of the full parameter, for the weights among shards by module."""
    return {shard.name: list(shard.spec.shape) for each in shards.values() for shard in each if shard.kind == WEIGHT}

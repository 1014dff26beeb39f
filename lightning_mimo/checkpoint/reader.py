"""Writes and reads the safetensors files of a checkpoint. Only the requested elements of a tensor are read."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_mimo.checkpoint.shards import ShardSpec, cut, join
from lightning_mimo.checkpoint.state import TensorShard
from lightning_mimo.errors import CheckpointError

_SPECS = "places"  # key in the header of each file


def file_name(module: str, rank: int) -> str:
    """Name of the file with a rank's shards of a module, such as ``images-rank00000.safetensors``."""
    return f"{module}-rank{rank:05d}.safetensors"


def write_shards(path: Path, shards: Collection[TensorShard]) -> None:
    """Write shards to a file. Their tensors must be contiguous, on the CPU, and not share memory."""
    keys = [f"{shard.name}/{shard.kind}" for shard in shards]
    assert len(set(keys)) == len(keys), "a rank writes each tensor once"
    specs = {key: shard.spec.to_dict() for key, shard in zip(keys, shards, strict=True)}
    tensors = {key: shard.tensor for key, shard in zip(keys, shards, strict=True)}
    save_file(tensors, path, metadata={_SPECS: json.dumps(specs)})


class CheckpointReader:
    """Reads tensors of selected modules from a checkpoint. Use it in a ``with`` statement."""

    def __init__(self, path: Path, modules: Collection[str]) -> None:
        """
        Args:
            path: checkpoint directory.
            modules: names of the modules whose files are opened.

        Raises:
            CheckpointError: if a file is damaged.
        """
        self._open = ExitStack()
        self._found: dict[str, dict[str, list[tuple[Any, ShardSpec]]]] = defaultdict(lambda: defaultdict(list))
        for module in modules:
            for file in sorted(path.glob(f"{module}-rank*.safetensors")):
                self._index(file)

    def _index(self, file: Path) -> None:
        try:
            opened = self._open.enter_context(safe_open(file, framework="pt"))
            specs = json.loads(opened.metadata()[_SPECS])
        except Exception as error:
            raise CheckpointError(f"{file} is damaged: {error}.") from error
        for key, spec in specs.items():
            name, _, kind = key.rpartition("/")
            self._found[name][kind].append((opened, ShardSpec.from_dict(spec)))

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
        return self._found[name][kind][0][1].shape

    def whole(self, name: str, kind: str) -> torch.Tensor:
        """Read a full tensor from all its shards.

        Raises:
            CheckpointError: if a shard is missing.
        """
        shards = self._found[name][kind]
        try:
            return join((spec, file.get_tensor(f"{name}/{kind}")) for file, spec in shards)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}; a file of the checkpoint is missing.") from error

    def read(self, name: str, kind: str, spec: ShardSpec) -> torch.Tensor:
        """Read the elements that a spec describes, flat, on the CPU.

        If the file has the same tensor-parallel shard, only the requested elements are read; otherwise the full tensor
        is read and cut.
        """
        runs, position = [], spec.start
        same = [(file, found) for file, found in self._found[name][kind] if found.is_same_shard(spec)]
        for file, found in sorted(same, key=lambda each: each[1].start):
            if found.start <= position < min(found.stop, spec.stop):
                stop = min(found.stop, spec.stop)
                runs.append(file.get_slice(f"{name}/{kind}")[position - found.start : stop - found.start])
                position = stop
        if position == spec.stop and runs:
            return torch.cat(runs) if len(runs) > 1 else runs[0]
        return cut(self.whole(name, kind), spec)


def parameters_in(shards: Mapping[str, Collection[TensorShard]]) -> dict[str, list[int]]:
    """Global parameter name -> shape of the full parameter, for the weights among shards by module."""
    return {shard.name: list(shard.spec.shape) for each in shards.values() for shard in each if shard.kind == "weight"}

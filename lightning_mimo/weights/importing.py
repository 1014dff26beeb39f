"""Shards of parameters out of a folder of safetensors, in the form in which checkpoints are loaded."""

from __future__ import annotations

from typing import Protocol

import torch

from lightning_mimo.errors import CheckpointError
from lightning_mimo.weights.files import SafetensorsFolder
from lightning_mimo.weights.rules import RuleTable, Shard, read_shard


class FlatShard(Shard, Protocol):
    """A run of consecutive elements of a tensor-parallel shard."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


class PretrainedReader:
    """Reads parameters by their global names; of the files, only the slices that a shard consists of."""

    def __init__(self, folder: SafetensorsFolder, table: RuleTable) -> None:
        """
        Args:
            folder: is read while parameters are.
            table: what they consist of.
        """
        self._folder = folder
        self._table = table

    def kinds(self, name: str) -> set[str]:
        """The weight alone: there is no state of an optimizer."""
        return {"weight"} if name in self._table.rules else set()

    def read(self, name: str, kind: str, spec: FlatShard) -> torch.Tensor:
        """The elements of a parameter that a spec describes, flat, on the CPU, in the dtype of the files.

        Raises:
            CheckpointError: if no rule is about the parameter, or gives it another shape.
        """
        self._table.check_parameters({name: spec.shape}, all_of=False)
        try:
            shard = read_shard(self._table.rules[name], self._folder, spec)
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{self._folder.path}: {name!r} cannot be read: {error}.") from error
        return shard.reshape(-1)[spec.start : spec.stop]

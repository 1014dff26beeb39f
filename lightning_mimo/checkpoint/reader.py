"""Pieces of tensors out of the files of a checkpoint: only what is asked for is read."""

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

from lightning_mimo.checkpoint.directory import CheckpointError
from lightning_mimo.checkpoint.pieces import Place, cut, join
from lightning_mimo.checkpoint.state import Piece

_PLACES = "places"  # key in the header of each file


def file_name(module: str, rank: int) -> str:
    """Name of the file that a rank writes of a module."""
    return f"{module}-rank{rank:05d}.safetensors"


def write_pieces(path: Path, pieces: Collection[Piece]) -> None:
    """Write pieces whose tensors are contiguous, on the CPU and share no memory."""
    keys = [f"{piece.name}/{piece.kind}" for piece in pieces]
    assert len(set(keys)) == len(keys), "a rank writes each tensor once"
    places = {key: piece.place.to_dict() for key, piece in zip(keys, pieces, strict=True)}
    tensors = {key: piece.tensor for key, piece in zip(keys, pieces, strict=True)}
    save_file(tensors, path, metadata={_PLACES: json.dumps(places)})


class CheckpointReader:
    """Reads the pieces of some modules of a checkpoint. To be used in a ``with`` statement."""

    def __init__(self, path: Path, modules: Collection[str]) -> None:
        """
        Args:
            path: the checkpoint.
            modules: whose files are looked into.

        Raises:
            CheckpointError: if a file is damaged.
        """
        self._open = ExitStack()
        self._found: dict[str, dict[str, list[tuple[Any, Place]]]] = defaultdict(lambda: defaultdict(list))
        for module in modules:
            for file in sorted(path.glob(f"{module}-rank*.safetensors")):
                self._index(file)

    def _index(self, file: Path) -> None:
        try:
            opened = self._open.enter_context(safe_open(file, framework="pt"))
            places = json.loads(opened.metadata()[_PLACES])
        except Exception as error:
            raise CheckpointError(f"{file} is damaged: {error}.") from error
        for key, place in places.items():
            name, _, kind = key.rpartition("/")
            self._found[name][kind].append((opened, Place.from_dict(place)))

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
        """Of the whole tensor."""
        return self._found[name][kind][0][1].shape

    def whole(self, name: str, kind: str) -> torch.Tensor:
        """A whole tensor, from all its pieces.

        Raises:
            CheckpointError: if a piece is missing.
        """
        pieces = self._found[name][kind]
        try:
            return join((place, file.get_tensor(f"{name}/{kind}")) for file, place in pieces)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}; a file of the checkpoint is missing.") from error

    def read(self, name: str, kind: str, place: Place) -> torch.Tensor:
        """See :class:`lightning_mimo.checkpoint.state.Reader`. Of a shard that was cut alike, only the run is read."""
        runs, position = [], place.start
        same = [(file, found) for file, found in self._found[name][kind] if found.is_same_shard(place)]
        for file, found in sorted(same, key=lambda each: each[1].start):
            if found.start <= position < min(found.stop, place.stop):
                stop = min(found.stop, place.stop)
                runs.append(file.get_slice(f"{name}/{kind}")[position - found.start : stop - found.start])
                position = stop
        if position == place.stop and runs:
            return torch.cat(runs) if len(runs) > 1 else runs[0]
        return cut(self.whole(name, kind), place)


def parameters_in(pieces: Mapping[str, Collection[Piece]]) -> dict[str, list[int]]:
    """Global name -> shape of the whole, of everything in some pieces by module."""
    return {piece.name: list(piece.place.shape) for each in pieces.values() for piece in each if piece.kind == "weight"}

"""Files that a run can take its initial weights from, seen as parameters with global names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch

from lightning_mimo.checkpoint.directory import MANIFEST, damaged_files, read_manifest
from lightning_mimo.checkpoint.reader import CheckpointReader
from lightning_mimo.checkpoint.shards import MAIN, WEIGHT, ShardSpec
from lightning_mimo.checkpoint.state import Reader
from lightning_mimo.errors import CheckpointError, ConfigError
from lightning_mimo.mimo.parameter_names import module_of
from lightning_mimo.weights.files import SafetensorsFolder, find_tensors
from lightning_mimo.weights.importing import FlatShard, PretrainedReader
from lightning_mimo.weights.rules import Rename, RuleTable, Source

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape of the full, unsharded tensor."""


class WeightSource(Protocol):
    """Weights in files."""

    @property
    def label(self) -> str:
        """What a user called it."""

    @property
    def shapes(self) -> Shapes:
        """Of the parameters that it holds, by global name."""

    @property
    def others(self) -> Shapes:
        """Of the tensors that are none of a parameter, under their names in the files."""

    def damage(self, *, rank: int, ranks: int) -> Iterator[str]:
        """Yield the problems of a rank's share of the files; all ranks together look at each file once."""

    def open(self, modules: Collection[str]) -> AbstractContextManager[Reader]:
        """Open the files of some modules."""


class CheckpointSource:
    """A checkpoint of this package, saved in any layout. Its optimizer state is not used."""

    def __init__(self, path: Path, *, label: str) -> None:
        """
        Raises:
            CheckpointError: if the path is not a complete checkpoint.
        """
        self.label = label
        self._path = path
        self._manifest = read_manifest(path)
        self.shapes: Shapes = {name: tuple(shape) for name, shape in self._manifest["parameters"].items()}
        self.others: Shapes = {}

    def damage(self, *, rank: int, ranks: int) -> Iterator[str]:
        yield from damaged_files(self._path, self._manifest, rank=rank, ranks=ranks)

    @contextmanager
    def open(self, modules: Collection[str]) -> Iterator[Reader]:
        with CheckpointReader(self._path, modules) as reader:
            yield _WeightsOnly(reader)


class _WeightsOnly:
    """Reads the weights of a checkpoint, or the optimizer's more exact copies of them, and no other state."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def kinds(self, name: str) -> set[str]:
        return self._reader.kinds(name) & {WEIGHT, MAIN}

    def read(self, name: str, kind: str, spec: ShardSpec) -> torch.Tensor:
        return self._reader.read(name, kind, spec)


class TensorSource:
    """One safetensors file, or a folder of them, with tensors under global names."""

    def __init__(self, path: Path, *, label: str) -> None:
        """
        Raises:
            ConfigError: if there are no safetensors.
            CheckpointError: if a file is missing or damaged.
        """
        self.label = label
        self._folder, self._files = find_tensors(path)
        with SafetensorsFolder(self._folder, self._files) as files:
            self.shapes: Shapes = files.shapes()
        self.others: Shapes = {}

    def damage(self, *, rank: int, ranks: int) -> Iterator[str]:
        yield from ()  # a damaged header is found when the file is opened; there are no checksums

    @contextmanager
    def open(self, modules: Collection[str]) -> Iterator[Reader]:
        named = {name: shape for name, shape in self.shapes.items() if module_of(name) in modules}
        rules = [Rename(name, Source(name=name, shape=shape)) for name, shape in named.items() if shape]
        with SafetensorsFolder(self._folder, self._files) as files:
            yield _NamedTensors(files, RuleTable(rules))


class _NamedTensors(PretrainedReader):
    """Reads tensors that have the names of parameters; a tensor without dimensions, which no rule is about, as well."""

    def read(self, name: str, kind: str, spec: FlatShard) -> torch.Tensor:
        if not spec.shape:
            return self._folder.whole(name).reshape(1)
        return super().read(name, kind, spec)

    def kinds(self, name: str) -> set[str]:
        return {WEIGHT} if name in self._folder.file_of else set()


class PretrainedSource:
    """A folder of the Hugging Face hub, and the rules of its tensors."""

    def __init__(self, path: Path, table: RuleTable) -> None:
        """
        Args:
            path: the folder.
            table: checked against its files; parameters whose tensors are missing may be in other sources.
        """
        self.label = str(path)
        self._path = path
        self._table = table
        with SafetensorsFolder(path) as files:
            shapes = files.shapes()
        self.shapes: Shapes = {name: table.rules[name].shape for name in table.targets_in(shapes)}
        used = {piece.source.name for name in self.shapes for piece in table.rules[name].pieces}
        self.others: Shapes = {name: shape for name, shape in shapes.items() if name not in used}

    def damage(self, *, rank: int, ranks: int) -> Iterator[str]:
        yield from ()

    @contextmanager
    def open(self, modules: Collection[str]) -> Iterator[Reader]:
        with SafetensorsFolder(self._path) as files:
            yield PretrainedReader(files, self._table)


def source_of(path: Path, *, argument: str) -> WeightSource:
    """A user's source of initial weights: our own checkpoint, a safetensors file, or a folder of them.

    Args:
        path: which.
        argument: that it was given as, for messages.

    Raises:
        ConfigError: if it is none of these.
        CheckpointError: if it is incomplete or damaged.
    """
    label = f"{argument}={str(path)!r}"
    if not path.exists():
        raise ConfigError(
            f"{label}: there is nothing at this path. Give a checkpoint of lightning-mimo, a safetensors file with "
            f"global names (lightning-mimo checkpoint export), or a folder of such files."
        )
    if (path / MANIFEST).is_file():
        return CheckpointSource(path, label=label)
    if (path / "config.json").is_file():
        raise ConfigError(
            f"{label} is a folder of the Hugging Face hub, whose tensors have other names. Give it to "
            f"HuggingFaceModule(pretrained={str(path)!r})."
        )
    if path.is_dir() and not any(path.glob("*.safetensors")):
        read_manifest(path)  # says why a checkpoint is not complete
    source = TensorSource(path, label=label)
    if not source.shapes:
        raise CheckpointError(f"{label} holds no tensors.")
    return source

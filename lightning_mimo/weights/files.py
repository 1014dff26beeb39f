"""A folder of safetensors files, as the Hugging Face hub has them: read in slices, written in shards.

Nothing in a folder is ever executed: safetensors holds numbers only, and files that hold code are refused.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_mimo.errors import CheckpointError, ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx)(\.index\.json)?$")


class SafetensorsFolder:
    """The tensors of a folder. Opens files when they are asked for; reads slices of them."""

    def __init__(self, path: Path, file_of: Mapping[str, str] | None = None) -> None:
        """
        Args:
            path: the folder.
            file_of: name of a tensor -> name of its file; ``None`` for what a model of the hub has.

        Raises:
            ConfigError: if it is no folder of a model, or holds pickles only.
            CheckpointError: if a file is missing or damaged.
        """
        self.path = path
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        self.file_of = _find_files(path) if file_of is None else dict(file_of)

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._open.close()
        self._files.clear()

    def names(self) -> Iterator[str]:
        """Of all tensors."""
        yield from self.file_of

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, from the files' headers."""
        return {name: tuple(self._slice(name).get_shape()) for name in self.file_of}

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor."""
        return self._slice(name)[0:0].dtype if self._slice(name).get_shape() else self.whole(name).dtype

    def read(self, name: str, index: tuple[int | slice, ...]) -> torch.Tensor:
        """A slice of a tensor; the rest of it is not read."""
        return self._slice(name)[index]

    def whole(self, name: str) -> torch.Tensor:
        return self._file(self.file_of[name]).get_tensor(name)

    def metadata(self, file: str) -> dict[str, str] | None:
        """What the header of a file says beside its tensors."""
        return self._file(file).metadata()

    def _slice(self, name: str) -> Any:
        return self._file(self.file_of[name]).get_slice(name)

    def _file(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = self._open.enter_context(_open(self.path / file))
        return self._files[file]


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Download it again.") from error


def _find_files(path: Path) -> dict[str, str]:
    """Name of a tensor -> name of its file."""
    if not path.is_dir():
        raise ConfigError(
            f"pretrained={str(path)!r} is no folder. Give the folder of a model that has been downloaded, such as by "
            f"'hf download llava-hf/llava-1.5-7b-hf --local-dir FOLDER'."
        )
    if (index := path / INDEX).is_file():
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        if missing := sorted(file for file in set(files.values()) if not (path / file).is_file()):
            raise CheckpointError(f"{index} names {missing[0]!r}, which is not there. Download the folder again.")
        return files
    if (single := path / SINGLE).is_file():
        with _open(single) as opened:
            return dict.fromkeys(opened.keys(), SINGLE)
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth")):
        raise ConfigError(
            f"{path} holds its weights as pickles ({pickles[0]}), which may run any code when they are read; they are "
            f'not opened. Convert them: python -c "from transformers import AutoModel; '
            f"AutoModel.from_pretrained('{path}').save_pretrained('FOLDER')\"."
        )
    raise ConfigError(
        f"{path} is no folder of a model: it has neither {INDEX} nor {SINGLE}. Give the whole folder, with its weights."
    )


def has_weights(path: Path) -> bool:
    """Whether a folder holds any file with weights, readable or not."""
    return path.is_dir() and any(_WEIGHTS.match(file.name) for file in path.iterdir())


def find_tensors(path: Path) -> tuple[Path, dict[str, str]]:
    """The tensors of one safetensors file, or of all those in a folder.

    Returns:
        The folder; and name of a tensor -> name of its file.

    Raises:
        ConfigError: if there are no safetensors, or two files hold the same tensor.
        CheckpointError: if a file is damaged.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise ConfigError(
            f"{path} is neither a safetensors file nor a folder of them. Pickles (.bin, .pt) may run any code when "
            f"they are read and are not opened: load one yourself and write it with safetensors.torch.save_file."
        )
    file_of: dict[str, str] = {}
    for file in files:
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                if name in file_of:
                    raise ConfigError(f"{path}: {file_of[name]} and {file.name} both hold {name!r}. Remove one.")
                file_of[name] = file.name
    return files[0].parent, file_of


def companions(path: Path) -> list[Path]:
    """Files of a folder that are no weights: configuration, tokenizer, processor, chat template."""
    return sorted(file for file in path.iterdir() if file.is_file() and not _WEIGHTS.match(file.name))


def split(sizes: Mapping[str, int], max_bytes: int) -> dict[str, str]:
    """Put tensors into files of at most some bytes; a larger tensor has one of its own.

    Args:
        sizes: name -> bytes, in the order in which tensors are put.
        max_bytes: of one file.

    Returns:
        Name -> name of the file.
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if used and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return dict.fromkeys(sizes, SINGLE)
    total = len(shards)
    return {
        name: f"model-{number:05d}-of-{total:05d}.safetensors"
        for number, names in enumerate(shards, start=1)
        for name in names
    }


def write_file(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None) -> None:
    """Write one file."""
    path.touch()
    mode = path.stat().st_mode  # as of any new file; safetensors lets only the owner read its own
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata or {}) or None
    )
    path.chmod(mode)


def write_index(path: Path, file_of: Mapping[str, str], *, total_size: int) -> None:
    """Write the index of several files.

    Args:
        path: the folder.
        file_of: name of a tensor -> name of its file.
        total_size: bytes of all tensors.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(file_of.items()))}
    (path / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def copy_files(files: Iterable[Path], folder: Path) -> Sequence[str]:
    """Copy files byte for byte; returns their names."""
    return [Path(shutil.copyfile(file, folder / file.name)).name for file in files]

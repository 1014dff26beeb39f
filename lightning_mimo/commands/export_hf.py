"""``lightning-mimo export-hf``: a checkpoint as a folder that transformers loads."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, override

import torch

from lightning_mimo.checkpoint.directory import TRAINER, damaged_files, read_manifest
from lightning_mimo.checkpoint.reader import CheckpointReader
from lightning_mimo.checkpoint.shards import MAIN, WEIGHT
from lightning_mimo.checkpoint.tools import modules_in
from lightning_mimo.errors import CheckpointError, ConfigError
from lightning_mimo.models.hugging_face.folder import read_config, require_transformers
from lightning_mimo.models.hugging_face.registry import model_of
from lightning_mimo.strategy.hugging_face import PRETRAINED_FOLDER
from lightning_mimo.weights.exporting import export_folder
from lightning_mimo.weights.files import SafetensorsFolder

_EMBEDDINGS = "language.embedding.word_embeddings.weight"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class _Arguments(argparse.ArgumentParser):
    """Parser whose errors are ConfigErrors."""

    @override
    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            f"export-hf: {message}. Write: export-hf CHECKPOINT OUT [--pretrained FOLDER] [--max-shard-size 5GB] "
            f"[--import MODULE]"
        )


def export_command(arguments: Sequence[str]) -> str:
    """Run ``export-hf`` and return the text to print.

    Args:
        arguments: of the command line, without the command.

    Raises:
        MimoError: if arguments or files cannot be used.
    """
    parser = _Arguments(prog="lightning-mimo export-hf", add_help=False, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pretrained", type=Path)
    parser.add_argument("--max-shard-size")
    parser.add_argument("--import", dest="module")
    options = parser.parse_args(arguments)
    size = None if options.max_shard_size is None else bytes_of(options.max_shard_size)
    if options.module is not None:
        try:
            importlib.import_module(options.module)
        except ImportError as error:
            raise ConfigError(f"export-hf --import {options.module}: {error}.") from error
    count = export_hf(options.checkpoint, options.out, pretrained=options.pretrained, max_shard_bytes=size)
    return f"{count} tensors written to {options.out}; transformers loads it with from_pretrained({str(options.out)!r})"


def bytes_of(size: str) -> int:
    """Bytes of a size as transformers writes it: ``"5GB"``, ``"200MB"``.

    Raises:
        ConfigError: if it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)", size.strip(), re.IGNORECASE)
    number = float(found[1]) * _UNITS[found[2].upper()] if found else 0
    if number < 1:
        raise ConfigError(f"--max-shard-size {size!r} is no size. Write a number and a unit, such as 5GB or 200MB.")
    return int(number)


def export_hf(
    checkpoint: Path, out: Path, *, pretrained: Path | None = None, max_shard_bytes: int | None = None
) -> int:
    """Write a checkpoint of a HuggingFaceModule in the form of the folder that it started from.

    Weights of mixed precision are rounded from the optimizer's float32 copies to the dtype of that folder. Its config,
    tokenizer, processor and generation config are copied.

    Args:
        checkpoint: of a HuggingFaceModule.
        out: is made; must not exist, or be an empty folder.
        pretrained: the folder that the run started from; ``None`` for where the checkpoint says that it was.
        max_shard_bytes: of one file; ``None`` divides tensors over files as that folder does.

    Returns:
        How many tensors.

    Raises:
        CheckpointError: if the checkpoint is damaged, or does not belong to the folder.
        ConfigError: if the folder is none of a supported model, or ``out`` exists.
    """
    require_transformers()
    manifest = read_manifest(checkpoint)
    if problems := list(damaged_files(checkpoint, manifest, rank=0, ranks=1)):
        raise CheckpointError(f"{checkpoint} is damaged: {problems[0]}.")
    parameters = manifest["parameters"]
    if _EMBEDDINGS not in parameters:
        raise CheckpointError(f"{checkpoint} has no {_EMBEDDINGS!r}, so it is none of a HuggingFaceModule.")
    pretrained = _recorded(checkpoint) if pretrained is None else pretrained
    model = model_of(read_config(pretrained))
    with SafetensorsFolder(pretrained) as source, CheckpointReader(checkpoint, modules_in(parameters)) as reader:
        table = model.rules(source.shapes(), parameters[_EMBEDDINGS][0])
        try:
            table.check_parameters(parameters, all_of=True)
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint} was not trained from {pretrained}: {error}") from error
        return export_folder(
            table,
            lambda name: reader.whole(name, MAIN if MAIN in reader.kinds(name) else WEIGHT),
            source=source,
            out=out,
            max_shard_bytes=max_shard_bytes,
        )


def _recorded(checkpoint: Path) -> Path:
    """The folder that a checkpoint names.

    Raises:
        CheckpointError: if it names none, or there is no such folder.
    """
    try:
        recorded = torch.load(checkpoint / TRAINER, weights_only=True, map_location="cpu").get(PRETRAINED_FOLDER)
    except Exception as error:
        raise CheckpointError(f"{checkpoint / TRAINER} cannot be read: {str(error).splitlines()[0]}") from error
    if recorded is None:
        raise CheckpointError(
            f"{checkpoint} does not say which pretrained folder it was trained from, so it is none of a "
            f"HuggingFaceModule or was imported. Give the folder: --pretrained FOLDER."
        )
    if not Path(recorded).is_dir():
        raise CheckpointError(
            f"{checkpoint} was trained from the folder {recorded}, which is no longer there. Say where it is now: "
            f"--pretrained FOLDER."
        )
    return Path(recorded)

"""``lightning-mimo export-hf``: a checkpoint as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

from lightning_mimo.checkpoint.directory import damaged_files, read_manifest
from lightning_mimo.checkpoint.reader import CheckpointReader
from lightning_mimo.checkpoint.shards import MAIN, WEIGHT
from lightning_mimo.checkpoint.tools import modules_in
from lightning_mimo.errors import CheckpointError
from lightning_mimo.models.hugging_face.folder import read_config
from lightning_mimo.models.hugging_face.registry import model_of
from lightning_mimo.weights.exporting import export_folder
from lightning_mimo.weights.files import SafetensorsFolder

_EMBEDDINGS = "language.embedding.word_embeddings.weight"


def export_hf(checkpoint: Path, out: Path, *, pretrained: Path, max_shard_bytes: int | None = None) -> int:
    """Write a checkpoint of a HuggingFaceModule in the form of the folder that it started from.

    Weights of mixed precision are rounded from the optimizer's float32 copies to the dtype of that folder.

    Args:
        checkpoint: of a HuggingFaceModule.
        out: is made; must not exist.
        pretrained: the folder that the run started from.
        max_shard_bytes: of one file; ``None`` divides tensors over files as that folder does.

    Returns:
        How many tensors.

    Raises:
        CheckpointError: if the checkpoint is damaged, or does not belong to the folder.
        ConfigError: if the folder is none of a supported model, or ``out`` exists.
    """
    manifest = read_manifest(checkpoint)
    if problems := list(damaged_files(checkpoint, manifest, rank=0, ranks=1)):
        raise CheckpointError(f"{checkpoint} is damaged: {problems[0]}.")
    parameters = manifest["parameters"]
    if _EMBEDDINGS not in parameters:
        raise CheckpointError(f"{checkpoint} has no {_EMBEDDINGS!r}, so it is none of a HuggingFaceModule.")
    model = model_of(read_config(pretrained))
    with SafetensorsFolder(pretrained) as source, CheckpointReader(checkpoint, modules_in(parameters)) as reader:
        table = model.rules(source.shapes(), parameters[_EMBEDDINGS][0])
        table.check_parameters(parameters, all_of=True)
        return export_folder(
            table,
            lambda name: reader.whole(name, MAIN if MAIN in reader.kinds(name) else WEIGHT),
            source=source,
            out=out,
            max_shard_bytes=max_shard_bytes,
        )

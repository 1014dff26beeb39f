"""Weights and a directory: written by all ranks at once, read back in any layout.

One file per module and rank that holds something no rank before it does:

    step=600.ckpt/
      trainer.pt                      what Lightning keeps (loops, callbacks), plain types only
      weights-images-rank0.pt         {global parameter name: {"piece", "dim", "stride", "tp_rank", "tp_size"}}
      weights-language-rank2.pt

Names and numbers are global, so a reader needs nothing of the layout that wrote them. Reading executes no code from
the files (``torch.load(weights_only=True)``).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from lightning_mimo.infra import MimoModelInfra
from lightning_mimo.initialization import cut_shard, global_named_parameters, shard_group
from lightning_mimo.model import SampleAlignedMimoModel, module_and_name

_TRAINER_FILE = "trainer.pt"


def save_weights(path: str, model: SampleAlignedMimoModel, infra: MimoModelInfra, *, extra: Mapping[str, Any]) -> None:
    """Write all weights and ``extra`` into a directory. Collective over the world.

    The directory appears under its name only when every file is in it.

    Args:
        path: the directory; replaced if it exists.
        model: wrapped or not.
        infra: process groups.
        extra: rank 0's is kept; plain types only.

    Raises:
        OSError: on every rank, if any rank could not write; naming the ranks.
    """
    final = Path(path)
    unfinished = final.with_name(final.name + ".unfinished")
    rank = dist.get_rank()

    def prepare() -> None:
        if rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

    def write() -> None:
        if rank == 0:
            torch.save(dict(extra), unfinished / _TRAINER_FILE)
        for name in infra.participating_modules:
            if pieces := _pieces(model, infra, name):
                torch.save(pieces, unfinished / f"weights-{name}-rank{rank}.pt")

    def publish() -> None:
        if rank == 0:
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)

    for step in (prepare, write, publish):
        _together(step, path)


@torch.no_grad()
def load_weights(path: str, model: SampleAlignedMimoModel, infra: MimoModelInfra) -> dict[str, Any]:
    """Fill this rank's parameters from a directory, whatever layout wrote it.

    Args:
        path: what :func:`save_weights` wrote.
        model: wrapped or not; filled in place.
        infra: process groups.

    Returns:
        The ``extra`` that was saved.

    Raises:
        ValueError: if the directory is not a whole checkpoint, or lacks a parameter of the model, or holds one of
            another shape.
    """
    directory = Path(path)
    if not (directory / _TRAINER_FILE).is_file():
        raise ValueError(f"{path} is not a checkpoint of lightning-mimo: it has no {_TRAINER_FILE}.")
    for name in infra.participating_modules:
        module, prefix = module_and_name(model, name)
        saved = _open_pieces(directory, name)
        groups = infra.pg_collections[name]
        for parameter_name, parameter in global_named_parameters(unwrap_model(module), prefix=prefix, groups=groups):
            if parameter_name not in saved:
                raise ValueError(f"{path} holds no {parameter_name!r}: it was written by another model.")
            master = _join(saved[parameter_name])
            shard = cut_shard(master, parameter, groups)
            if shard.shape != parameter.shape:
                raise ValueError(
                    f"{path}: {parameter_name!r} has the shape {tuple(shard.shape)} on this rank, but the model wants "
                    f"{tuple(parameter.shape)}: it was written by a model of another size."
                )
            parameter.copy_(shard)
    return torch.load(directory / _TRAINER_FILE, weights_only=True)


def _pieces(model: SampleAlignedMimoModel, infra: MimoModelInfra, name: str) -> dict[str, dict[str, Any]]:
    """What this rank writes of a module: its shards of what it holds as the first of several replicas."""
    module, prefix = module_and_name(model, name)
    groups = infra.pg_collections[name]
    pieces = {}
    for parameter_name, parameter in global_named_parameters(unwrap_model(module), prefix=prefix, groups=groups):
        replicas = groups.dp if getattr(parameter, "allreduce", True) else groups.expt_dp
        if replicas.rank() > 0:
            continue
        group = shard_group(parameter, groups)
        pieces[parameter_name] = {
            # A view of a DDP buffer would drag the whole buffer into the file.
            "piece": parameter.detach().clone(),
            "dim": parameter.partition_dim if group else 0,
            "stride": parameter.partition_stride if group else 1,
            "tp_rank": group.rank() if group else 0,
            "tp_size": group.size() if group else 1,
        }
    return pieces


def _open_pieces(directory: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """All pieces of one module by parameter, memory-mapped: only what is used is read."""
    pieces: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(directory.glob(f"weights-{name}-rank*.pt")):
        for parameter_name, piece in torch.load(file, weights_only=True, mmap=True).items():
            pieces.setdefault(parameter_name, []).append(piece)
    return pieces


def _join(pieces: list[dict[str, Any]]) -> torch.Tensor:
    """The whole parameter from its tensor-parallel pieces."""
    by_rank = {piece["tp_rank"]: piece for piece in pieces}
    first = by_rank[0]
    ordered = [by_rank[rank]["piece"].chunk(first["stride"], dim=first["dim"]) for rank in range(first["tp_size"])]
    return torch.cat([part[s] for s in range(first["stride"]) for part in ordered], dim=first["dim"])


def _together(step: Callable[[], None], path: str) -> None:
    """Run a step on every rank; if it fails on one, raise on all."""
    error = None
    try:
        step()
    except OSError as exception:
        error = f"{type(exception).__name__}: {exception}"
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    failed = {rank: text for rank, text in enumerate(errors) if text}
    if failed:
        raise OSError(f"The checkpoint {path} could not be written: {failed}.")

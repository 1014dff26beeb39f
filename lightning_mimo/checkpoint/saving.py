"""Converts the training state of a rank to the content of a checkpoint, and restores it."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from lightning_mimo import __version__
from lightning_mimo.checkpoint.directory import TRAINER, damaged_files, read_manifest
from lightning_mimo.checkpoint.reader import CheckpointReader
from lightning_mimo.checkpoint.shards import ShardSpec
from lightning_mimo.checkpoint.state import TensorShard, load_shards, shards_of
from lightning_mimo.checkpoint.writer import Content
from lightning_mimo.errors import CheckpointError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.model import RaggedMimoModel
from lightning_mimo.mimo.parameter_names import named_buffers_of, named_parameters_of
from lightning_mimo.optim.mimo_optimizer import SingleSyncMimoOptimizer
from lightning_mimo.parallel.infra import MimoModelInfra

_AXES = ("tp", "cp", "pp", "dp", "ep", "expt_tp")
_GENERATOR = "generator"  # kind of the shards that hold states of random generators
Generators = Mapping[str, torch.Tensor]
"""Name -> state of each random generator of a rank, as a uint8 tensor."""


def generators() -> Generators:
    """Return the states of this rank's random generators, which dropout uses."""
    states = {"cpu": torch.get_rng_state(), "default": torch.cuda.get_rng_state()}
    return {**states, **get_cuda_rng_tracker().get_states()}


def set_generators(states: Generators) -> None:
    """Restore states that :func:`generators` returned."""
    states = dict(states)
    torch.set_rng_state(states.pop("cpu"))
    torch.cuda.set_rng_state(states.pop("default"))
    get_cuda_rng_tracker().set_states(states)


def content_of(
    model: RaggedMimoModel,
    infra: MimoModelInfra,
    optimizer: SingleSyncMimoOptimizer | None,
    *,
    states: Generators,
    trainer: Mapping[str, Any],
    about: Mapping[str, Any],
) -> Content:
    """Copy everything that this rank writes to the CPU. Training may continue as soon as this returns.

    Args:
        model: model whose parameters are gathered (see ``complete_gathering``).
        infra: process groups.
        optimizer: optimizer to save; ``None`` saves weights only.
        states: states of the random generators.
        trainer: state of Lightning's trainer, plain types only. Only rank 0's is written.
        about: further entries of the manifest.

    Raises:
        CheckpointError: if ``trainer`` could not be read back without executing code.
    """
    rank = dist.get_rank()
    # Done on every rank although only rank 0's is written, so that all ranks fail together.
    written = _plain_bytes(trainer)
    shards = {
        module: [
            replace(shard, tensor=shard.tensor.to("cpu", copy=True))
            for shard in shards_of(model, infra, module, optimizer)
        ]
        for module in infra.participating_modules
    }
    if optimizer is not None:
        own = next(iter(shards.values()))
        own.extend(
            TensorShard(
                name=f"rank{rank}.{name}",
                kind=_GENERATOR,
                spec=ShardSpec(shape=tuple(state.shape), stop=state.numel()),
                tensor=state.clone(),
            )
            for name, state in states.items()
        )
    return Content(
        shards=shards,
        trainer=written if rank == 0 else b"",
        about={"lightning_mimo": __version__, "layout": _layout_as_dict(infra.layout), **about},
    )


def load(
    path: Path, model: RaggedMimoModel, infra: MimoModelInfra, optimizer: SingleSyncMimoOptimizer | None
) -> dict[str, Any]:
    """Load the model, and the optimizer if given, from a verified checkpoint of any layout.

    Returns:
        The state of Lightning's trainer.

    Raises:
        CheckpointError: if the file of the trainer could only be read by executing code from it.
    """
    trainer = _plain_content(path / TRAINER)
    with CheckpointReader(path, infra.participating_modules) as reader:
        load_shards(model, infra, reader, optimizer)
    return trainer


def load_generators(path: Path, infra: MimoModelInfra) -> Generators | None:
    """Read the states of this rank's random generators; ``None`` if the checkpoint has another layout."""
    if read_manifest(path)["layout"] != _layout_as_dict(infra.layout):
        return None
    prefix = f"rank{dist.get_rank()}."
    with CheckpointReader(path, infra.participating_modules) as reader:
        names = [name for name in reader.names() if name.startswith(prefix)]
        return {name.removeprefix(prefix): reader.whole(name, _GENERATOR) for name in names} or None


def verify(path: Path, model: RaggedMimoModel, infra: MimoModelInfra) -> None:
    """Check that a checkpoint is complete, undamaged and matches the model. Collective over the world.

    Raises:
        CheckpointError: on every rank, naming the file or the parameter.
    """
    problems: list[str] = []
    held: dict[str, list[int]] = {}
    try:
        manifest = read_manifest(path)
        problems.extend(damaged_files(path, manifest, rank=dist.get_rank(), ranks=dist.get_world_size()))
        held = _shapes(model, infra)
        problems.extend(_mismatches(held, manifest["parameters"]))
    except (CheckpointError, OSError) as error:
        problems.append(str(error))
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (problems, list(held)))
    said = [problem for each, _ in everywhere for problem in each]
    if not said:
        known = {name for _, names in everywhere for name in names}
        extra = [name for name in manifest["parameters"] if name not in known]
        said = [f"it holds {name!r}, which this model does not have" for name in extra]
    if said:
        more = f" (and {len(said) - 1} more problems)" if len(said) > 1 else ""
        raise CheckpointError(f"The checkpoint {path} cannot be loaded: {said[0]}{more}. Nothing was changed.")


def _shapes(model: RaggedMimoModel, infra: MimoModelInfra) -> dict[str, list[int]]:
    """Global name -> full shape of all parameters and persistent buffers of this rank."""
    shapes = {
        name: list(ShardSpec.of(parameter, infra.pg_collections[module]).shape)
        for module in infra.participating_modules
        for name, parameter in named_parameters_of(model, infra, module)
    }
    for module in infra.participating_modules:
        shapes |= {name: list(buffer.shape) for name, buffer in named_buffers_of(model, infra, module)}
    return shapes


def _mismatches(held: Mapping[str, list[int]], saved: Mapping[str, list[int]]) -> list[str]:
    missing = [f"it does not hold {name!r}, which this model has" for name in held if name not in saved]
    return missing + [
        f"{name!r} has the shape {tuple(saved[name])} there and {tuple(shape)} in this model"
        for name, shape in held.items()
        if name in saved and saved[name] != shape
    ]


def _plain_bytes(content: Mapping[str, Any]) -> bytes:
    """Serialize ``content`` so that it can be read without executing code.

    Raises:
        CheckpointError: naming the entry for which this is impossible.
    """
    written = _saved(dict(content))
    try:
        torch.load(io.BytesIO(written), weights_only=True)
    except Exception as error:
        entry = next((key for key, value in content.items() if not is_plain(value)), "?")
        raise CheckpointError(
            f"{entry!r} of the checkpoint holds objects that could only be read by executing code from the file. Use "
            f"only numbers, strings, tensors, lists and dictionaries in on_save_checkpoint, state_dict() of callbacks "
            f"and save_hyperparameters(). ({str(error).splitlines()[0]})"
        ) from error
    return written


def _plain_content(file: Path) -> dict[str, Any]:
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        raise CheckpointError(
            f"{file} holds objects that could only be read by executing code from it, so it was not written by "
            f"lightning-mimo. Nothing was changed. ({str(error).splitlines()[0]})"
        ) from error


def is_plain(value: Any) -> bool:
    """Whether a value can be read back from a checkpoint without executing code."""
    try:
        torch.load(io.BytesIO(_saved(value)), weights_only=True)
    except Exception:
        return False
    return True


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _layout_as_dict(layout: MimoLayout) -> dict[str, Any]:
    return {
        "colocated": layout.colocated,
        "modules": {
            name: {"ranks": [sizes.ranks.start, sizes.ranks.stop], **{axis: getattr(sizes, axis) for axis in _AXES}}
            for name, sizes in layout.modules.items()
        },
    }


def modules_of(manifest: Mapping[str, Any]) -> Collection[str]:
    """Names of the modules of a checkpoint."""
    return manifest["layout"]["modules"]

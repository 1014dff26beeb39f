"""Converts the training state of a rank to the content of a checkpoint."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from lightning_mimo import __version__
from lightning_mimo.checkpoint.reader import GENERATOR
from lightning_mimo.checkpoint.shards import ShardSpec
from lightning_mimo.checkpoint.staging import StagingBuffer
from lightning_mimo.checkpoint.state import TensorShard, shards_of
from lightning_mimo.checkpoint.writer import Content
from lightning_mimo.errors import CheckpointError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.model import RaggedMimoModel
from lightning_mimo.optim.mimo_optimizer import SingleSyncMimoOptimizer
from lightning_mimo.parallel.infra import MimoModelInfra

_AXES = ("tp", "cp", "pp", "dp", "ep", "expt_tp")
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
    staging: StagingBuffer,
    states: Generators,
    trainer: Mapping[str, Any],
    about: Mapping[str, Any],
) -> Content:
    """Copy everything that this rank writes to the CPU. Training may continue as soon as this returns.

    Args:
        model: model whose parameters are gathered (see ``complete_gathering``).
        infra: process groups.
        optimizer: optimizer to save; ``None`` saves weights only.
        staging: memory of the copies; must not be used again before they are written.
        states: states of the random generators.
        trainer: state of Lightning's trainer, plain types only. Only rank 0's is written.
        about: further entries of the manifest.

    Raises:
        CheckpointError: if ``trainer`` could not be read back without executing code.
    """
    rank, modules = dist.get_rank(), infra.participating_modules
    # Done on every rank although only rank 0's is written, so that all ranks fail together.
    written = _plain_bytes(trainer)
    own_shards = [(name, shard) for name in modules for shard in shards_of(model, infra, name, optimizer)]
    copies = staging.copy([shard.tensor for _, shard in own_shards])
    shards: dict[str, list[TensorShard]] = {name: [] for name in modules}
    for (name, shard), copy in zip(own_shards, copies, strict=True):
        shards[name].append(replace(shard, tensor=copy))
    if optimizer is not None:
        own = next(iter(shards.values()))
        own.extend(
            TensorShard(
                name=f"rank{rank}.{name}",
                kind=GENERATOR,
                spec=ShardSpec(shape=tuple(state.shape), stop=state.numel()),
                tensor=state.clone(),
            )
            for name, state in states.items()
        )
    return Content(
        shards=shards,
        trainer=written if rank == 0 else b"",
        about={"lightning_mimo": __version__, "layout": layout_as_dict(infra.layout), **about},
    )


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


def layout_as_dict(layout: MimoLayout) -> dict[str, Any]:
    """A layout as it is in the manifest."""
    return {
        "colocated": layout.colocated,
        "modules": {
            name: {"ranks": [sizes.ranks.start, sizes.ranks.stop], **{axis: getattr(sizes, axis) for axis in _AXES}}
            for name, sizes in layout.modules.items()
        },
    }

"""Checkpoints of a run as Lightning asks for them: when they are written, removed, read, and where a run goes on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_mimo.checkpoint.directory import discard, read_manifest
from lightning_mimo.checkpoint.saving import Generators, content_of, generators, load, load_generators, verify
from lightning_mimo.checkpoint.writer import CheckpointWriter
from lightning_mimo.data.data_state import DataState
from lightning_mimo.errors import CheckpointError, CheckpointWriteError
from lightning_mimo.mimo.model import RaggedMimoModel
from lightning_mimo.optim.ddp import complete_gathering
from lightning_mimo.optim.optimizer import MimoTorchOptimizer
from lightning_mimo.parallel.infra import MimoModelInfra


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What a checkpoint says of how to go on.

    Attributes:
        data_state: in the data.
        states: of this rank's random generators; ``None`` if it was written in another layout.
        step: optimizer steps that were done.
    """

    data_state: DataState
    states: Generators | None
    step: int


class RunCheckpoints:
    """All methods but :meth:`remove` and :meth:`close` are collective over the world."""

    def __init__(self, *, async_save: bool, on_save_error: str, timeout: timedelta) -> None:
        """
        Args:
            async_save: return from :meth:`save` as soon as everything is copied, and write behind the training.
            on_save_error: ``raise`` or ``warn``.
            timeout: how long rank 0 waits for the files of the others.
        """
        self._async = async_save
        self._on_error = on_save_error
        self._writer = CheckpointWriter(timeout=timeout)

    def save(
        self,
        path: Path,
        model: RaggedMimoModel,
        infra: MimoModelInfra,
        optimizer: MimoTorchOptimizer | None,
        *,
        trainer: Mapping[str, Any],
        data_state: DataState | None,
        window: Generators | None,
    ) -> None:
        """Write a checkpoint, after one that is still being written.

        Args:
            path: the directory; replaced if it exists.
            model: the model.
            infra: process groups.
            optimizer: ``None`` for weights only.
            trainer: what Lightning keeps.
            data_state: in the training data; ``None`` outside of training.
            window: states of the generators when the accumulation window began, if one is open.

        Raises:
            CheckpointWriteError: on every rank, if it failed on any; unless errors are to be warnings.
        """
        self.finish()
        complete_gathering(model)
        try:
            content = content_of(
                model,
                infra,
                None if optimizer is None else optimizer.mimo,
                states=window or generators(),
                trainer=trainer,
                about={
                    "step": trainer["global_step"],
                    "epoch": trainer["epoch"],
                    "weights_only": optimizer is None,
                    "position": None if data_state is None else vars(data_state),
                },
            )
            self._writer.begin(path, content)
        except CheckpointWriteError as error:
            self._complain(error)
        if not self._async:
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            CheckpointWriteError: as :meth:`save`.
        """
        try:
            self._writer.wait()
        except CheckpointWriteError as error:
            self._complain(error)

    def remove(self, path: Path) -> None:
        """Remove a checkpoint, not before what is being written has replaced it. To be called on rank 0."""
        self._writer.then(lambda: discard(path))

    def load(
        self,
        path: Path,
        model: RaggedMimoModel,
        infra: MimoModelInfra,
        optimizer: MimoTorchOptimizer | None,
        *,
        global_batch_size: int,
    ) -> tuple[dict[str, Any], Resumed | None]:
        """Fill the model, and the optimizer if training goes on.

        Returns:
            What Lightning kept; and how to go on, if there is an optimizer.

        Raises:
            CheckpointError: if the checkpoint does not fit, or training cannot go on from it. Nothing is changed then.
        """
        self.finish()
        complete_gathering(model)
        # First, because it is the check that ends on all ranks alike, also where one of them cannot read the files.
        verify(path, model, infra)
        if optimizer is None:
            return load(path, model, infra, None), None
        _check_can_resume_from(path, global_batch_size)
        trainer = load(path, model, infra, optimizer.mimo)
        optimizer.load_plain_state(trainer["optimizer_states"][0])
        manifest = read_manifest(path)
        data_state = DataState(**manifest["position"])
        return trainer, Resumed(data_state=data_state, states=load_generators(path, infra), step=manifest["step"])

    def close(self) -> None:
        """Let what is being written end, without a word to the other ranks."""
        self._writer.close()

    def _complain(self, error: CheckpointWriteError) -> None:
        if self._on_error == "raise":
            raise error
        if dist.get_rank() == 0:
            warnings.warn(f"{error} Training goes on.", RuntimeWarning, stacklevel=2)


def _check_can_resume_from(path: Path, global_batch_size: int) -> None:
    manifest = read_manifest(path)
    if manifest["weights_only"]:
        raise CheckpointError(
            f"fit(ckpt_path={str(path)!r}): it holds weights only, so training cannot go on from it. Save with "
            f"ModelCheckpoint(save_weights_only=False), or use it with validate, test and predict."
        )
    data_state = DataState(**manifest["position"])
    if data_state.batches and data_state.global_batch_size != global_batch_size:
        raise CheckpointError(
            f"fit(ckpt_path={str(path)!r}): it was saved after {data_state.batches} batches of "
            f"{data_state.global_batch_size} samples of an epoch, but global_batch_size is {global_batch_size} now, so "
            f"the next sample cannot be told. Set global_batch_size={data_state.global_batch_size}, or go on from a "
            f"checkpoint of the end of an epoch."
        )

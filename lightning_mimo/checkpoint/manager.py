"""Saves, removes and loads the checkpoints of a run, as Lightning requests it."""

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
    """State that a checkpoint holds besides weights and optimizer, for resuming.

    Attributes:
        data_state: position in the training data.
        states: states of this rank's random generators; ``None`` if the checkpoint has another layout.
        step: number of optimizer steps done.
    """

    data_state: DataState
    states: Generators | None
    step: int


class RunCheckpoints:
    """Saves and loads checkpoints. All methods but :meth:`remove` and :meth:`close` are collective over the world."""

    def __init__(self, *, async_save: bool, on_save_error: str, timeout: timedelta) -> None:
        """
        Args:
            async_save: return from :meth:`save` once the state is copied, and write the files asynchronously.
            on_save_error: ``raise`` or ``warn``.
            timeout: time that rank 0 waits for the files of the other ranks.
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
        """Write a checkpoint, after waiting for one that is still being written.

        Args:
            path: directory to write; an existing checkpoint there is replaced.
            model: model to save.
            infra: process groups.
            optimizer: optimizer to save; ``None`` saves weights only.
            trainer: state of Lightning's trainer.
            data_state: position in the training data; ``None`` outside training.
            window: states of the random generators at the start of the current accumulation, if one is in progress.

        Raises:
            CheckpointWriteError: on every rank, if writing failed on any rank and ``on_save_error`` is ``raise``.
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
        """Wait for the checkpoint that is being written, if any.

        Raises:
            CheckpointWriteError: on every rank, if writing failed on any rank and ``on_save_error`` is ``raise``.
        """
        try:
            self._writer.wait()
        except CheckpointWriteError as error:
            self._complain(error)

    def remove(self, path: Path) -> None:
        """Remove a checkpoint once the checkpoint that is being written is complete. Call it on rank 0 only."""
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
        """Load a checkpoint into the model and, to resume training, into the optimizer.

        Args:
            path: checkpoint directory.
            model: model to fill.
            infra: process groups.
            optimizer: optimizer to fill; ``None`` loads weights only.
            global_batch_size: samples of one global batch in this run.

        Returns:
            The state of Lightning's trainer, and with an optimizer the state for resuming.

        Raises:
            CheckpointError: if the checkpoint does not match the model, or training cannot resume from it. Model and
                optimizer are unchanged then.
        """
        self.finish()
        complete_gathering(model)
        # First, because this check has the same result on all ranks, even if only one of them cannot read the files.
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
        """Wait for this rank's asynchronous write without communicating with other ranks."""
        self._writer.close()

    def _complain(self, error: CheckpointWriteError) -> None:
        if self._on_error == "raise":
            raise error
        if dist.get_rank() == 0:
            warnings.warn(f"{error} Training continues.", RuntimeWarning, stacklevel=2)


def _check_can_resume_from(path: Path, global_batch_size: int) -> None:
    manifest = read_manifest(path)
    if manifest["weights_only"]:
        raise CheckpointError(
            f"fit(ckpt_path={str(path)!r}): the checkpoint holds weights only, so training cannot resume from it. To "
            f"start a new run with its weights, leave ckpt_path out and set MimoModule(init_from={str(path)!r}). To "
            f"resume, save with ModelCheckpoint(save_weights_only=False)."
        )
    data_state = DataState(**manifest["position"])
    if data_state.batches and data_state.global_batch_size != global_batch_size:
        raise CheckpointError(
            f"fit(ckpt_path={str(path)!r}): the checkpoint was saved after {data_state.batches} batches of "
            f"{data_state.global_batch_size} samples of an epoch, but global_batch_size is {global_batch_size} now, so "
            f"the next sample is not defined. Set global_batch_size={data_state.global_batch_size}, or resume from a "
            f"checkpoint that was saved at the end of an epoch."
        )

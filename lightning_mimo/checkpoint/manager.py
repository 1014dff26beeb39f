"""Saves, removes and loads the checkpoints of a run, as Lightning requests it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_mimo.checkpoint.loading import TrainerCheck, check
from lightning_mimo.checkpoint.manifest import Manifest
from lightning_mimo.checkpoint.replacement import discard, recover
from lightning_mimo.checkpoint.saving import Generators, content_of, generators
from lightning_mimo.checkpoint.staging import StagingBuffer
from lightning_mimo.checkpoint.writer import CheckpointWriter, together
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
        self._staging = StagingBuffer()

    @property
    def staged_bytes(self) -> int:
        """Bytes of pinned host memory that are kept for the next checkpoint."""
        return self._staging.nbytes

    def save(
        self,
        path: Path,
        model: RaggedMimoModel,
        infra: MimoModelInfra,
        optimizer: MimoTorchOptimizer | None,
        *,
        trainer: Mapping[str, Any],
        data_state: DataState | None,
        generators_before: Generators | None,
    ) -> None:
        """Write a checkpoint, after waiting for one that is still being written.

        Args:
            path: directory to write; an existing checkpoint there is replaced.
            model: model to save.
            infra: process groups.
            optimizer: optimizer to save; ``None`` saves weights only.
            trainer: state of Lightning's trainer.
            data_state: position in the training data; ``None`` outside training.
            generators_before: states of the random generators at the start of the current gradient accumulation, if one
                is in progress.

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
                staging=self._staging,
                states=generators_before or generators(),
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
        """Remove a checkpoint once the checkpoint that is being written is complete. Call it on rank 0 only.

        If it cannot be removed, or is not a checkpoint, it stays, with a warning.
        """
        self._writer.then(lambda: _remove(path))

    def load(
        self,
        path: Path,
        model: RaggedMimoModel,
        infra: MimoModelInfra,
        optimizer: MimoTorchOptimizer | None,
        *,
        global_batch_size: int,
        check_trainer: TrainerCheck,
    ) -> tuple[dict[str, Any], Resumed | None]:
        """Load a checkpoint into the model and, to resume training, into the optimizer.

        Args:
            path: checkpoint directory.
            model: model to fill.
            infra: process groups.
            optimizer: optimizer to fill; ``None`` loads weights only.
            global_batch_size: samples of one global batch in this run.
            check_trainer: yields the problems of the state of Lightning's trainer.

        Returns:
            The state of Lightning's trainer, and with an optimizer the state for resuming.

        Raises:
            CheckpointError: if the checkpoint does not match the model, or training cannot resume from it. Model and
                optimizer are unchanged then.
        """
        self.finish()
        complete_gathering(model)
        together(lambda: recover(path) if dist.get_rank() == 0 else None, path)
        checked = check(
            path,
            model,
            infra,
            optimizer,
            check_trainer=check_trainer,
            check_manifest=lambda manifest: _problems_of_resuming(path, manifest, global_batch_size),
        )
        checked.load(model, infra, optimizer)
        if optimizer is None:
            return checked.trainer, None
        manifest = checked.manifest
        assert manifest["position"] is not None, "checked"
        resumed = Resumed(data_state=DataState(**manifest["position"]), states=checked.states, step=manifest["step"])
        return checked.trainer, resumed

    def close(self) -> None:
        """Wait for this rank's asynchronous write without communicating with other ranks."""
        self._writer.close()

    def _complain(self, error: CheckpointWriteError) -> None:
        if self._on_error == "raise":
            raise error
        if dist.get_rank() == 0:
            warnings.warn(f"{error} Training continues.", RuntimeWarning, stacklevel=2)


def _remove(path: Path) -> None:
    try:
        discard(path)
    except (CheckpointError, OSError) as error:
        warnings.warn(f"The checkpoint {path} could not be removed: {error}", RuntimeWarning, stacklevel=2)


def _problems_of_resuming(path: Path, manifest: Manifest, global_batch_size: int) -> Iterator[str]:
    if manifest["weights_only"]:
        yield (
            f"it holds weights only, so training cannot resume from it. To start a new run with its weights, leave "
            f"ckpt_path out and set MimoModule(init_from={str(path)!r}). To resume, save with "
            f"ModelCheckpoint(save_weights_only=False)"
        )
        return
    assert manifest["position"] is not None, "checked with weights_only"
    batches, size = manifest["position"]["batches"], manifest["position"]["global_batch_size"]
    if batches and size != global_batch_size:
        yield (
            f"it was saved after {batches} batches of {size} samples of an epoch, but global_batch_size is "
            f"{global_batch_size} now, so the next sample is not defined. Set global_batch_size={size}, or resume from "
            f"a checkpoint that was saved at the end of an epoch"
        )

"""Trains two steps in a process of its own, as a user's script would, and leaves the recording in a folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

import lightning.pytorch as pl
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from torch.utils.data import DataLoader, Dataset

from lightning_mimo.errors import ConfigError
from lightning_mimo.launch.node_rank import end_process
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.precision import MimoPrecision
from lightning_mimo.strategy.strategy import MimoStrategy
from lightning_mimo.verification.comparison import Difference, Differences, compare, over_all_ranks
from lightning_mimo.verification.recorder import Recorder, Recording, parameters_of
from lightning_mimo.verification.scale import ScaledLayout

STEPS = 2
_SHOWN_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is trained.

    Attributes:
        module: a MimoModule that has not been trained.
        dataset: samples, in the order in which they are taken.
        ddp: options of Megatron's DistributedDataParallel by module.
        seed: of the run.
    """

    module: MimoModule
    dataset: Dataset
    ddp: Mapping[str, DistributedDataParallelConfig]
    seed: int


class _Reference(Recorder):
    """Writes down what one process does."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        torch.save(vars(self.recording), self._file)


class _Comparison(Recorder):
    """Compares what a rank does with what was written down."""

    def __init__(self, reference: Path, folder: Path) -> None:
        super().__init__()
        self._reference, self._folder = reference, folder

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        expected = Recording(**torch.load(self._reference, weights_only=True, mmap=True))
        held = {
            name: (parameter, groups)
            for name, parameter, groups in parameters_of(pl_module.mimo_model, pl_module.infra)
        }
        found = compare(self.recording, expected, held)
        content = {kind: vars(difference) for kind, difference in found.items()}
        torch.save(content, self._folder / f"rank{trainer.global_rank}.pt")


def record_reference(subject: Subject, layout: ScaledLayout, file: Path) -> None:
    """Train in one process and write the recording to a file.

    Args:
        subject: what is trained.
        layout: of one process.
        file: to be written.

    Raises:
        ConfigError: if the run failed; the end of what it printed is on stderr.
    """
    _in_own_process(lambda: _train(subject, layout, _Reference(file)), log=file.with_suffix(".log"), what="one process")


def find_differences(subject: Subject, layout: ScaledLayout, reference: Path, folder: Path) -> Differences:
    """Train in a layout and compare every rank with the reference.

    Args:
        subject: what is trained.
        layout: on which ranks.
        reference: file of :func:`record_reference`.
        folder: an empty folder for the ranks.

    Returns:
        The largest differences over all ranks.

    Raises:
        ConfigError: if the run failed; the end of what it printed is on stderr.
    """
    what = f"{layout.ranks} ranks"
    _in_own_process(lambda: _train(subject, layout, _Comparison(reference, folder)), log=folder / "log", what=what)
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(layout.ranks)]
    return over_all_ranks([{kind: Difference(**each) for kind, each in rank.items()} for rank in ranks])


def _train(subject: Subject, layout: ScaledLayout, recorder: Recorder) -> None:
    """Run on the ranks of a layout; every rank comes out of it."""
    pl.seed_everything(subject.seed)
    strategy = MimoStrategy(
        dict(layout.modules),
        layout.global_batch_size,
        layout.num_microbatches,
        colocate=layout.colocate,
        ddp=dict(subject.ddp),
        precision_plugin=MimoPrecision("64-true"),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=layout.ranks,
        strategy=strategy,
        max_steps=STEPS,
        limit_val_batches=0,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(subject.module, DataLoader(subject.dataset, batch_size=layout.global_batch_size))


def _in_own_process(work: Callable[[], None], *, log: Path, what: str) -> None:
    """Fork, so that the run's ranks and groups end with it; in the new process, do the work and exit."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    process = os.fork()
    if process == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        work()
        end_process(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code != 0:
        print(*log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:], sep="\n", file=sys.stderr)
        raise ConfigError(f"training in {what} ended with exit code {code}; what it printed last is above.")

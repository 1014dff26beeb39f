"""Short runs, of two steps on three ranks, that end badly on one rank; ``CASE RANK`` on the command line."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lightning_mimo import MimoStrategy, ModuleParallelism, Monitoring
from tests.support.evaluation import PicturesAndText, TinyModule

RANKS = 3
TIMEOUT = 3.0
"""Seconds that a rank may wait for another, in the cases that wait for this."""


class Cause(Exception):  # noqa: N818  (the word that tests look for)
    """What is raised on purpose."""


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # in one piece, whatever other ranks print


def _raise() -> None:
    raise Cause("on purpose")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_supervisor() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)


def _work() -> None:
    time.sleep(600)


def _work_a_little() -> None:
    time.sleep(4)


def _exit() -> None:
    sys.exit(3)


def _exit_by_exception() -> None:
    raise SystemExit(3)


def _exit_with_0() -> None:
    sys.exit(0)


CASES: dict[str, tuple[str, Callable[[], None]]] = {
    "raise_in_on_fit_end": ("on_fit_end", _raise),
    "raise_in_teardown": ("teardown", _raise),
    "raise_after_fit": ("after_fit", _raise),
    "exit_after_fit": ("after_fit", _exit),
    "system_exit_after_fit": ("after_fit", _exit_by_exception),
    "exit_in_training": ("on_train_batch_end", _exit),
    "exit_with_0_in_training": ("on_train_batch_end", _exit_with_0),
    "interrupt_in_training": ("on_train_batch_end", _interrupt),
    "kill_in_training": ("on_train_batch_end", _kill),
    "kill_in_teardown": ("teardown", _kill),
    "kill_after_fit": ("after_fit", _kill),
    "work_after_fit": ("after_fit", _work),
    "work_a_little_after_fit": ("after_fit", _work_a_little),
    "kill_while_workers_load": ("on_train_batch_end", _kill),
    "stop_in_setup": ("setup", _stop),
    "kill_supervisor": ("on_train_batch_end", _kill_supervisor),
    "fork_fails": ("", lambda: None),
    "all_exit_with_0_in_training": ("on_train_batch_end", _exit_with_0),
    "nothing": ("", lambda: None),
}
"""Name -> where, and what one rank (of a case that begins with ``all``, every rank) does there."""


class SlowFile(PicturesAndText):
    """The third batch takes ten minutes, so that workers are busy with it when the first one is done."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= 24:
            time.sleep(600)
        return super().__getitem__(index)


class Misbehaves(pl.Callback):
    def __init__(self, where: str, do: Callable[[], None], rank: int | None) -> None:
        self._where, self._do, self._rank = where, do, rank

    def reach(self, where: str, rank: int) -> None:
        if where == self._where and self._rank in (rank, None):
            _say(f"rank {rank} is process {os.getpid()}")
            self._do()

    def setup(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.reach("setup", trainer.global_rank)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            self.reach("on_train_batch_end", trainer.global_rank)

    def on_fit_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.reach("on_fit_end", trainer.global_rank)

    def teardown(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.reach("teardown", trainer.global_rank)


def run(case: str, rank: int) -> None:
    """What a user's script would do; every rank comes out of it."""
    pl.seed_everything(3)
    where, do = CASES[case]
    misbehaves = Misbehaves(where, do, None if case.startswith("all") else rank)
    waits = case.startswith(("work_after", "stop"))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=MimoStrategy(
            {"images": ModuleParallelism(), "language": ModuleParallelism(tp=2)},
            12,
            monitoring=Monitoring(timeout=timedelta(seconds=TIMEOUT if waits else 300)),
        ),
        max_steps=2,
        limit_val_batches=0,
        callbacks=[misbehaves],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    workers = case == "kill_while_workers_load"
    data = SlowFile(36) if workers else PicturesAndText(24)
    if case == "fork_fails":
        _let_fork_fail_after(2)
    trainer.fit(TinyModule(), DataLoader(data, batch_size=12, num_workers=int(workers)))
    misbehaves.reach("after_fit", trainer.global_rank)
    _say(f"rank {trainer.global_rank} is done")


def _let_fork_fail_after(forks: int) -> None:
    real, done = os.fork, []

    def fork() -> int:
        if len(done) == forks:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        done.append(None)
        return real()

    os.fork = fork


def main() -> None:
    case, rank = sys.argv[1:]
    run(case, int(rank))

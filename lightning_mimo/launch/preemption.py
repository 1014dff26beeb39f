"""A run that is told to end saves where it is and ends, on all ranks after the same step.

Signals are noted only, and no collective happens inside of a handler: what each rank has noted travels with the
collective that every batch has anyway, so all ranks learn of it together.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_mimo.launch.cluster import requeue_job

_NAME = "last-preempted.ckpt"
"""``fit(ckpt_path="last")`` finds it beside the checkpoints of ModelCheckpoint."""


class Signals:
    """Notes SIGTERM, and the signal that SLURM is asked to send before the time is up, while it is installed.

    Attributes:
        received: the last one.
        requeue: whether the one before the time is up was among them. SIGTERM alone also comes with ``scancel``, and a
            job that somebody has cancelled must not come back.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.requeue = False
        self._before: dict[signal.Signals, Any] = {}

    def install(self, environment: object) -> None:
        """Take the place of Lightning's handlers, which save and broadcast from inside of the handler."""
        requeue = environment.requeue_signal if isinstance(environment, SLURMEnvironment) else signal.SIGUSR1
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets no other thread handle signals
        for each in (signal.SIGTERM, requeue):
            if each is not None and each not in self._before:
                self._before[each] = signal.signal(each, self._note)

    def remove(self) -> None:
        """Put back what was there before; not in a run that was told to end, which may be told once more.

        Lightning's handler would broadcast then, to ranks that have ended. It puts back the process's handlers itself.
        """
        if self.received is None:
            for each, handler in self._before.items():
                signal.signal(each, handler)
        self._before.clear()
        self.received = None
        self.requeue = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.requeue |= self.received != signal.SIGTERM


class Preemption(pl.Callback):
    """Added by MimoStrategy. Ends the run after the batch in which the ranks agreed to; training is saved before."""

    def __init__(self, must_stop: Callable[[], bool], signals: Signals, environment: object) -> None:
        """
        Args:
            must_stop: whether the batch that just ended is the last one; the same on every rank.
            signals: what this rank was told.
            environment: Lightning's ClusterEnvironment.
        """
        self._must_stop = must_stop
        self._signals = signals
        self._environment = environment

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._must_stop():
            # What the step has logged: Lightning would write it down after this hook only.
            trainer._logger_connector.update_train_step_metrics()
        self._end_if_told(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._end_if_told(trainer)

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._end_if_told(trainer)

    def on_predict_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._end_if_told(trainer)

    def _end_if_told(self, trainer: pl.Trainer) -> None:
        if not self._must_stop():
            return
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and not trainer.sanity_checking:
            self._save(trainer)
        else:
            rank_zero_info("Told to end by a signal.")
        if fitting:
            self._requeue(trainer)
        trainer.strategy.barrier()
        raise SIGTERMException

    def _save(self, trainer: pl.Trainer) -> None:
        path = _hpc_path(trainer) if self._requeues else _beside_checkpoints(trainer)
        trainer.save_checkpoint(path)
        strategy: Any = trainer.strategy  # MimoStrategy, which imports this folder
        strategy.finish_saving()
        rank_zero_info(f"Told to end by a signal: saved {path} after step {trainer.global_step}.")

    def _requeue(self, trainer: pl.Trainer) -> None:
        asked = trainer.strategy.reduce_boolean_decision(self._signals.requeue, all=False)
        if asked and self._requeues and trainer.is_global_zero and (problem := requeue_job()) is not None:
            rank_zero_warn(f"The job will not go on by itself: {problem}. Submit it again to go on.")

    @property
    def _requeues(self) -> bool:
        return isinstance(self._environment, SLURMEnvironment) and self._environment.auto_requeue


def _hpc_path(trainer: pl.Trainer) -> str:
    """Where Lightning looks when SLURM starts the job again."""
    return trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)


def _beside_checkpoints(trainer: pl.Trainer) -> str:
    folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    return str(Path(folder) / _NAME)

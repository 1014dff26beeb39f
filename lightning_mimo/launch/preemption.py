"""Ends a run on a signal: all ranks save after the same step and exit.

The signal handler only records the signal and calls no collective. The record is sent with the collective that every
batch needs anyway, so all ranks learn of the signal after the same batch.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, override

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_mimo.launch.cluster import requeue_job
from lightning_mimo.upstream.lightning import _SignalConnector

_NAME = "last-preempted.ckpt"
"""``fit(ckpt_path="last")`` finds it beside the checkpoints of ModelCheckpoint."""


class Signals(_SignalConnector):
    """Notes SIGTERM, and the signal that SLURM is asked to send before the time is up, while a run is on.

    The Trainer is given it in the place of its own connector, whose handlers save and broadcast inside of the handler,
    where the other ranks may be in any other collective.

    Attributes:
        received: the last signal, if any.
        requeue: whether the signal before the time limit was received. ``scancel`` sends SIGTERM only, and a cancelled
            job must not be requeued.
    """

    def __init__(self, trainer: pl.Trainer, environment: object) -> None:
        """
        Args:
            trainer: registers the handlers before it runs a stage and puts back those of the process at its end.
            environment: Lightning's ClusterEnvironment.
        """
        super().__init__(trainer)
        self.received: signal.Signals | None = None
        self.requeue = False
        self._environment = environment

    @override
    def register_signal_handlers(self) -> None:
        """Note signals from here on; in a thread other than the main one, which Python lets handle none, do nothing."""
        self._original_handlers = self._get_current_signal_handlers()
        environment = self._environment
        requeue = environment.requeue_signal if isinstance(environment, SLURMEnvironment) else signal.SIGUSR1
        for each in (signal.SIGTERM, requeue):
            if each is not None:
                self._register_signal(each, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.requeue |= self.received != signal.SIGTERM


class Preemption(pl.Callback):
    """Saves and ends the run after the batch in which the ranks agreed to stop. Added by MimoStrategy."""

    def __init__(self, must_stop: Callable[[], bool], signals: Signals, environment: object) -> None:
        """
        Args:
            must_stop: returns whether the run ends after the current batch; the same on every rank.
            signals: signals that this rank has received.
            environment: Lightning's ClusterEnvironment.
        """
        self._must_stop = must_stop
        self._signals = signals
        self._environment = environment

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._must_stop():
            # Write the logged values of this step, which Lightning would do only after this hook.
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
            rank_zero_info("Ended by a signal.")
        if fitting:
            self._requeue(trainer)
        trainer.strategy.barrier()
        raise SIGTERMException

    def _save(self, trainer: pl.Trainer) -> None:
        path = _hpc_path(trainer) if self._requeues else _beside_checkpoints(trainer)
        trainer.save_checkpoint(path)
        strategy: Any = trainer.strategy  # MimoStrategy, which imports this folder
        strategy.finish_saving()
        rank_zero_info(f"Ended by a signal: saved {path} after step {trainer.global_step}.")

    def _requeue(self, trainer: pl.Trainer) -> None:
        asked = trainer.strategy.reduce_boolean_decision(self._signals.requeue, all=False)
        if asked and self._requeues and trainer.is_global_zero and (problem := requeue_job()) is not None:
            rank_zero_warn(f"The job could not be requeued: {problem}. Submit it again to resume.")

    @property
    def _requeues(self) -> bool:
        return isinstance(self._environment, SLURMEnvironment) and self._environment.auto_requeue


def _hpc_path(trainer: pl.Trainer) -> str:
    """Path at which Lightning looks for a checkpoint when Slurm restarts the job."""
    return trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)


def _beside_checkpoints(trainer: pl.Trainer) -> str:
    folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    return str(Path(folder) / _NAME)

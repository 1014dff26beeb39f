"""A run that is told to end saves where it is and ends, on all ranks after the same step.

Signals are noted only, and no collective happens inside of a handler: what each rank has noted travels with the
collective that every batch has anyway, so all ranks learn of it together.
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
        received: the last one.
        requeue: whether the one before the time is up was among them. SIGTERM alone also comes with ``scancel``, and a
            job that somebody has cancelled must not come back.
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
        trainer.strategy.finish_saving()
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

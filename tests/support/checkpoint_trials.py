"""Loads many checkpoints in one run, and tells for each whether it was refused and whether anything was changed."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from lightning_mimo.checkpoint.state import shards_of
from lightning_mimo.errors import CheckpointError
from tests.parity.layouts import Layout, train
from tests.parity.oracle import Task

Result = Literal[
    "refused",
    "accepted",
    "accepted with other numbers",
    "accepted with other tensors",
    "changed by a refusal",
    "raw error",
    "hung",
]
_SECONDS = 20


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of one checkpoint.

    Attributes:
        result: ``accepted`` if all that was loaded equals what the original gives; ``accepted with other numbers`` if
            weights and the tensors of the optimizer do, but not counters, learning rates or the position in the data.
        message: of the error.
    """

    result: Result
    message: str = ""


class Hung(BaseException):
    """A checkpoint took too long."""


def try_checkpoints(task: Task, layout: Layout, original: str, paths: Sequence[str], **options: Any) -> list[Trial]:
    """Load checkpoints one after the other into a run that has gone on since the original was saved. Collective."""
    trials = Trials(original, paths)
    *_, strategy = train(task, layout, callbacks=[trials], **options)
    strategy.infra.destroy()
    return trials.trials


class Trials(pl.Callback):
    """Tries checkpoints at the end of the second step of a run."""

    def __init__(self, original: str, paths: Sequence[str]) -> None:
        self._original, self._paths = original, paths
        self.trials: list[Trial] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trials or trainer.global_step != 2:
            return
        strategy: Any = trainer.strategy
        now = f"{self._original}.now"
        trainer.save_checkpoint(now)
        expected = _load(strategy, self._original)
        before = _load(strategy, now)
        for path in self._paths:
            trial, changed = _try(strategy, path, expected=expected, before=before)
            self.trials.append(trial)
            if changed:
                before = _load(strategy, now)
        trainer.should_stop = True


def _try(strategy: Any, path: str, *, expected: Any, before: Any) -> tuple[Trial, bool]:
    """A trial, and whether it has changed anything."""
    try:
        with _limited():
            loaded = _load(strategy, path)
    except CheckpointError as error:
        changed = not _equal(_state(strategy), before["state"])
        return Trial(result="changed by a refusal" if changed else "refused", message=str(error)), changed
    except Hung:
        return Trial(result="hung"), True
    except Exception as error:
        return Trial(result="raw error", message=f"{type(error).__name__}: {error}"), True
    if _equal(loaded, expected):
        return Trial(result="accepted"), True
    same = all(_equal(loaded["state"][key], expected["state"][key]) for key in ("shards", "parameters"))
    return Trial(result="accepted with other numbers" if same else "accepted with other tensors"), True


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hung

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def _load(strategy: Any, path: str) -> dict[str, Any]:
    trainer = strategy.load_checkpoint(path)
    return {"trainer": trainer, "resumed": vars(strategy.run._resumed), "state": _state(strategy)}


def _state(strategy: Any) -> dict[str, Any]:
    """Everything on this rank that a checkpoint changes."""
    infra, (optimizer,) = strategy.infra, strategy.optimizers
    model = strategy.lightning_module.mimo_model
    shards = {
        f"{shard.name}/{shard.kind}/{shard.spec.tp_rank}/{shard.spec.start}": shard.tensor.clone()
        for module in infra.participating_modules
        for shard in shards_of(model, infra, module, optimizer.mimo)
    }
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {"shards": shards, "parameters": parameters, "plain": optimizer.plain_state()}


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(two) and len(one) == len(two) and all(map(_equal, one, two))
    return type(one) is type(two) and one == two


def is_clear(message: str) -> bool:
    """Whether the message of a refusal is one that was written for it."""
    return bool(re.search(r"The checkpoint \S+ cannot be loaded: .+ Nothing was changed\.$", message, re.DOTALL))

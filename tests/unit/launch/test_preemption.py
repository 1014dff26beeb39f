"""Which signals are noted, and who handles them afterwards."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import lightning.pytorch as pl
import pytest

from lightning_mimo.launch.preemption import Signals


@pytest.fixture(autouse=True)
def handlers_stay_in_their_test() -> Iterator[None]:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize(
    ("told", "requeue"),
    [([signal.SIGTERM], False), ([signal.SIGUSR1], True), ([signal.SIGUSR1, signal.SIGTERM], True)],
    ids=["cancelled", "time_is_up", "both"],
)
def test_only_the_signal_before_the_time_is_up_asks_for_the_queue(told: list[signal.Signals], requeue: bool) -> None:
    signals = Signals(trainer(), None)
    signals.register_signal_handlers()
    for each in told:
        os.kill(os.getpid(), each)
    assert signals.received == told[-1]
    assert signals.requeue is requeue
    assert not signals.received_sigterm, "Lightning would end this rank by itself"


@pytest.mark.parametrize("is_told", [False, True])
def test_handlers_of_before_come_back(is_told: bool) -> None:
    def theirs(number: int, frame: object) -> None:
        raise AssertionError("the run has this signal")

    signal.signal(signal.SIGTERM, theirs)
    signals = Signals(trainer(), None)
    signals.register_signal_handlers()
    if is_told:
        os.kill(os.getpid(), signal.SIGTERM)
    signals.teardown()
    assert signal.getsignal(signal.SIGTERM) is theirs
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=Signals(trainer(), None).register_signal_handlers)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def trainer() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)

"""Which signals are noted, and who handles them afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

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
    signals = Signals()
    signals.install(None)
    for each in told:
        os.kill(os.getpid(), each)
    assert signals.received == told[-1]
    assert signals.requeue is requeue


def test_handlers_of_before_come_back_unless_the_run_was_told_to_end() -> None:
    def lightnings(number: int, frame: object) -> None:
        raise AssertionError("other ranks are gone")

    signal.signal(signal.SIGTERM, lightnings)
    signals = Signals()
    signals.install(None)
    signals.remove()
    assert signal.getsignal(signal.SIGTERM) is lightnings
    signals.install(None)
    os.kill(os.getpid(), signal.SIGTERM)
    signals.remove()
    assert signals.received is None
    os.kill(os.getpid(), signal.SIGTERM)  # once more, as after scontrol requeue

"""What the strategy logs, as the Trainer finds it."""

from __future__ import annotations

import pytest
import torch

from lightning_mimo.strategy.step_metrics import StepMetrics


def in_numbers(metrics: StepMetrics, *, on_step: bool = True) -> dict[str, dict[str, float]]:
    return {
        kind: {name: float(value) for name, value in values.items()}
        for kind, values in metrics.metrics(on_step).items()
    }


@pytest.fixture
def metrics() -> StepMetrics:
    metrics = StepMetrics()
    metrics.show({"train/loss": 3.0, "telemetry/compute_s": 0.5}, prog_bar=["train/loss"])
    return metrics


def test_loggers_callbacks_and_the_progress_bar_find_them(metrics: StepMetrics) -> None:
    both = {"train/loss": 3.0, "telemetry/compute_s": 0.5}
    assert in_numbers(metrics) == {"callback": both, "log": both, "pbar": {"train/loss": 3.0}}
    values = [*metrics.metrics(on_step=True)["callback"].values(), *metrics.metrics(on_step=True)["log"].values()]
    assert all(value.dtype == torch.float32 and value.shape == () for value in values)


def test_loggers_get_what_is_of_the_last_batch_and_callbacks_keep_the_rest(metrics: StepMetrics) -> None:
    metrics.show({"train/loss": 2.0}, prog_bar=["train/loss"])
    assert in_numbers(metrics) == {
        "callback": {"train/loss": 2.0, "telemetry/compute_s": 0.5},
        "log": {"train/loss": 2.0},
        "pbar": {"train/loss": 2.0},
    }


def test_progress_bar_does_not_wait_for_tensors(metrics: StepMetrics) -> None:
    metrics.show_tensors({"train/loss": torch.tensor(1.0)})
    found = in_numbers(metrics)
    assert found["log"] == {"train/loss": 1.0}
    assert found["callback"]["train/loss"] == 1.0
    assert found["pbar"] == {"train/loss": 3.0}, "the last that was read"


def test_what_a_hook_logs_goes_first(metrics: StepMetrics) -> None:
    metrics.log("on_train_batch_end", "train/loss", torch.tensor(7.0), prog_bar=True, on_step=True, on_epoch=False)
    found = in_numbers(metrics)
    assert [found[kind]["train/loss"] for kind in ("callback", "log", "pbar")] == [7.0, 7.0, 7.0]


def test_nothing_of_a_step_is_of_an_epoch(metrics: StepMetrics) -> None:
    assert metrics, "the Trainer looks into it"
    assert in_numbers(metrics, on_step=False) == {"callback": {}, "log": {}, "pbar": {}}
    metrics.reset(metrics=False, fx="training_step")  # what log() does in the first batch of an epoch
    assert in_numbers(metrics)["callback"]
    metrics.reset()
    assert in_numbers(metrics) == {"callback": {}, "log": {}, "pbar": {}}

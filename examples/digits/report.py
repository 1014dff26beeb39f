"""Prints the accuracy at the end of a run, and a few samples with the model's answers."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl

from examples.digits.data import decode_answer
from examples.digits.terminal import show_sample


class DigitsReport(pl.Callback):
    """Prints the held-out accuracy and draws samples after training, validation and prediction.

    The datamodule needs a ``held_out_set`` with ``describe(index)``, and an attribute ``swapped`` that names swapped
    inputs.
    """

    def __init__(self, *, samples: int = 3) -> None:
        """
        Args:
            samples: number of held-out samples to draw.
        """
        self._samples = samples
        self._started = 0.0
        self._answers: list[str] = []
        self._predicted: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and self._is_last_validation(trainer):
            # All ranks generate the answers together; rank 0 prints them at the end.
            tokens = trainer.strategy.generate(batch, max_new_tokens=pl_module.max_new_tokens)
            self._answers = [decode_answer(row) for row in tokens.tolist()]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_last_validation(trainer) and trainer.is_global_zero:
            self._print(trainer)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._predicted.extend(outputs)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        right = 0
        for answer in self._predicted:
            images, question, expected = trainer.datamodule.held_out_set.describe(answer["sample_index"])
            written = decode_answer(answer["tokens"])
            right += written == expected
            if answer["sample_index"] < self._samples:
                print(show_sample(images, question, written, expected), end="\n\n")
        print(f"{right} of {len(self._predicted)} answers, each written token by token, are right")

    def _is_last_validation(self, trainer: pl.Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        return trainer.state.fn == "validate" or trainer.global_step >= trainer.max_steps > 0

    def _print(self, trainer: pl.Trainer) -> None:
        data = trainer.datamodule
        print()
        for index in range(self._samples):
            images, question, expected = data.held_out_set.describe(index)
            print(show_sample(images, question, self._answers[index], expected), end="\n\n")
        accuracy = float(trainer.callback_metrics["val/exact_match"])
        swapped = f" ({data.swapped} swapped between samples)" if data.swapped else ""
        print(f"exact match on {len(data.held_out_set)} samples never seen in training{swapped}: {accuracy:.1%}")
        if self._started:
            print(f"seconds from the start of fit: {time.perf_counter() - self._started:.0f}")

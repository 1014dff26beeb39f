"""Numbers of a config, as written and as parsed."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import Namespace

from lightning_mimo.commands.config_check import restore_whole_numbers


@pytest.mark.parametrize(
    ("written", "arguments", "parsed", "wanted"),
    [
        ("{trainer: {limit_val_batches: 1}}", [], 1.0, 1),
        ("{trainer: {limit_val_batches: 1.0}}", [], 1.0, 1.0),
        ("{trainer: {limit_val_batches: 0.5}}", ["--trainer.limit_val_batches=20"], 20.0, 20),
        ("{trainer: {limit_val_batches: 1}}", ["--trainer.limit_val_batches", "1.0"], 1.0, 1.0),
        ("{model: {}}", [], None, None),
    ],
)
def test_limits_of_batches_stay_as_written(
    written: str, arguments: list[str], parsed: float | None, wanted: float | None, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(written)
    trainer = Namespace(limit_val_batches=parsed)
    restore_whole_numbers(trainer, ["--config", str(config), *arguments])
    assert (trainer.limit_val_batches, type(trainer.limit_val_batches)) == (wanted, type(wanted))

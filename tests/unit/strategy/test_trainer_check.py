"""What of Lightning is refused by name, before any process exists."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.plugins import AsyncCheckpointIO

from lightning_mimo import MimoModule, MimoStrategy, ModuleParallelism


class Manual(MimoModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def trainer(**options: Any) -> pl.Trainer:
    strategy = MimoStrategy({"images": ModuleParallelism(), "language": ModuleParallelism()}, 8)
    return pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, **options)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (StochasticWeightAveraging(1e-3), r"StochasticWeightAveraging is not supported by .*lightning-mimo checkpoint"),
        (EMAWeightAveraging(), r"EMAWeightAveraging is not supported by MimoStrategy: .*behind DDP's buffers"),
        (BackboneFinetuning(), r"BackboneFinetuning is not supported .*MimoModule\(frozen=\['images.encoders'\]\)"),
        (ModelPruning("l1_unstructured"), r"ModelPruning is not supported by MimoStrategy: .*shards"),
        (BatchSizeFinder(), r"BatchSizeFinder is not supported by MimoStrategy: .*global_batch_size"),
        (LearningRateFinder(), r"LearningRateFinder is not supported by MimoStrategy: .*Leave it out"),
        (OnExceptionCheckpoint("."), r"OnExceptionCheckpoint is not supported by MimoStrategy: .*wait for ever"),
        (
            ModelCheckpoint(save_on_exception=True),
            r"ModelCheckpoint\(save_on_exception=True\) is not .*Set it to False",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, pl.Callback) else "",
)
def test_callback_is_refused_with_its_name_and_a_remedy(callback: pl.Callback, message: str) -> None:
    refusing = trainer(callbacks=[callback])
    with pytest.raises(ValueError, match=message) as refused:
        refusing.fit(MimoModule(), [])
    assert "\n" not in str(refused.value)
    assert not refusing.strategy.launcher._children, "no process was started"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_batchnorm": True}, r"sync_batchnorm=True\) is not supported.*LayerNorm or GroupNorm"),
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, r"gradient_clip_algorithm='value'\) is not"),
        (
            {"plugins": AsyncCheckpointIO()},
            r"AsyncCheckpointIO is not supported.*MimoStrategy\(saving=Saving\(asynchronous=True\)\)",
        ),
    ],
    ids=["sync_batchnorm", "clip_by_value", "checkpoint_io"],
)
def test_option_is_refused_with_a_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(**options).fit(MimoModule(), [])


def test_manual_optimization_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Manual.automatic_optimization=False is not supported by MimoStrategy"):
        trainer().fit(Manual(), [])


class TakesNoNumber(MimoModule):
    """As Lightning allows it."""

    def training_step(self, batch: Any) -> Any:
        return self(batch)


class TakesAnIterator(MimoModule):
    def validation_step(self, dataloader_iter: Any) -> Any:
        return self(next(dataloader_iter))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (TakesNoNumber, r"TakesNoNumber.training_step\(batch: .*def training_step\(self, batch, batch_idx\)\."),
        (
            TakesAnIterator,
            r"TakesAnIterator.validation_step\(dataloader_iter: .* does not take what",
        ),
    ],
)
def test_steps_that_take_something_else_are_refused(module: type[MimoModule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer().fit(module(), [])


def test_other_modules_are_refused_before_any_process_starts() -> None:
    refusing = trainer()
    with pytest.raises(ValueError, match=r"trains a MimoModule, but got a LightningModule"):
        refusing.fit(pl.LightningModule(), [])
    assert not refusing.strategy.launcher._children


def test_what_decides_by_metrics_is_taken() -> None:
    callbacks = [EarlyStopping("val/loss"), ModelCheckpoint(monitor="train/loss"), Timer("00:00:01:00")]
    taking = trainer(callbacks=callbacks, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
    assert taking.strategy.validate(taking).world_size == 2

"""What is refused in a module before any process starts."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mimo import ConfigError, MimoModule, MimoStrategy, ModuleParallelism
from lightning_mimo.strategy.from_checkpoint import arguments_of
from lightning_mimo.strategy.local_paths import local_path
from lightning_mimo.strategy.own_state import own_state


def trainer(**options: Any) -> pl.Trainer:
    strategy = MimoStrategy({"images": ModuleParallelism(), "language": ModuleParallelism()}, 8)
    return pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, **options)


class Keeps(MimoModule):
    def __init__(self, lr: float, interval: object) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_hyperparameter_that_cannot_be_saved_is_named_before_training() -> None:
    message = r"Keeps\.save_hyperparameters\(\) keeps 'interval', a timedelta, .*ignore=\['interval'\]"
    with pytest.raises(ConfigError, match=message):
        trainer().fit(Keeps(0.1, timedelta(1)), [])


def test_trained_parameter_of_the_module_itself_is_refused() -> None:
    module = MimoModule()
    module.temperature = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(ConfigError, match=r"MimoModule\.temperature is a Parameter of the module itself, which would"):
        trainer().fit(module, [])
    module.temperature.requires_grad_(False)
    module.register_buffer("unsaved", torch.ones(1), persistent=False)
    assert own_state(module).keys() == {"temperature"}


def test_loading_in_part_is_refused() -> None:
    module = MimoModule()
    module.strict_loading = False
    with pytest.raises(ConfigError, match=r"MimoModule\.strict_loading=False is not supported.*Leave it out"):
        trainer().fit(module, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"map_location": "cpu"}, r"load_from_checkpoint\(map_location=\.\.\.\) is not supported\. Leave it out"),
        ({"strict": False}, r"strict=False\) is not supported.*init_missing=\[\.\.\.\]"),
        ({}, r"last\.ckpt is not a checkpoint of lightning-mimo"),
    ],
    ids=["map_location", "strict", "missing"],
)
def test_what_load_from_checkpoint_does_not_do_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MimoModule.load_from_checkpoint(tmp_path / "last.ckpt", **options)


def test_argument_that_a_checkpoint_does_not_hold_is_named() -> None:
    assert arguments_of(Keeps, {"lr": 0.1, "other": 1}, {"interval": 2}) == {"lr": 0.1, "interval": 2}
    with pytest.raises(ConfigError, match=r"does not hold the argument 'interval'.*save_hyperparameters\(\) in Keeps"):
        arguments_of(Keeps, {"lr": 0.1}, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"callbacks": ModelCheckpoint("memory://runs")},
            r"ModelCheckpoint\(dirpath=\.\.\.\): 'memory://runs' is in a re",
        ),
        (
            {"default_root_dir": "s3://bucket/runs"},
            r"default_root_dir=\.\.\.\): 's3://bucket/runs' is in a remote store",
        ),
        (
            {"default_root_dir": "file:///runs"},
            r"default_root_dir=\.\.\.\): 'file:/runs': write the folder without file",
        ),
    ],
    ids=["callback", "root", "file"],
)
def test_remote_store_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(**options).fit(MimoModule(), [])


def test_paths_of_this_machine_are_taken() -> None:
    assert local_path("file:///data/a.ckpt") == local_path("/data/a.ckpt") == Path("/data/a.ckpt")
    assert local_path("runs/epoch=1.ckpt") == Path("runs/epoch=1.ckpt")
    with pytest.raises(ConfigError, match=r"'gs://bucket/a.ckpt' is in a remote store \(gs\)"):
        local_path("gs://bucket/a.ckpt")

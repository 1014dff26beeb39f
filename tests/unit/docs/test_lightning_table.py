"""The page on Lightning is complete, and each of its rows is true."""

from __future__ import annotations

import inspect
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import lightning.pytorch.callbacks as callbacks
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_mimo import ConfigError, MimoPrecision, MimoStrategy, ModuleParallelism
from tests.support.hooks import CALLBACK_HOOKS, DATA_HOOKS, MODULE_HOOKS, TRANSFER_HOOKS

PAGE = Path("docs/reference/lightning.md").read_text()
OWNERS = {
    "callback": CALLBACK_HOOKS,
    "module": (*MODULE_HOOKS, *TRANSFER_HOOKS),
    "data": (*DATA_HOOKS, *TRANSFER_HOOKS),
}


def rows(title: str) -> dict[str, str]:
    """Name -> the second column of the table under a heading."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", section, re.MULTILINE))


TRAINER, CALLBACKS, HOOKS = rows("Trainer"), rows("Callbacks"), rows("Hooks")


def test_every_argument_callback_and_hook_is_on_the_page() -> None:
    arguments = list(inspect.signature(pl.Trainer.__init__).parameters)[1:]
    assert list(TRAINER) == arguments
    assert set(CALLBACKS) == set(callbacks.__all__)
    assert {
        hook: ", ".join(owner for owner, names in OWNERS.items() if hook in names)
        for hook in sorted({hook for names in OWNERS.values() for hook in names})
    } == HOOKS


# ---- arguments

VALUES: dict[str, Any] = {
    "accelerator": "cpu",
    "strategy": None,
    "devices": 2,
    "num_nodes": 1,
    "precision": "bf16-mixed",
    "logger": CSVLogger("logs"),
    "callbacks": [callbacks.EarlyStopping("val/loss")],
    "fast_dev_run": 2,
    "max_epochs": 2,
    "min_epochs": 1,
    "max_steps": 5,
    "min_steps": 2,
    "max_time": "00:01:00:00",
    "limit_train_batches": 0.5,
    "limit_val_batches": 2,
    "limit_test_batches": 2,
    "limit_predict_batches": 2,
    "overfit_batches": 2,
    "val_check_interval": timedelta(minutes=5),
    "check_val_every_n_epoch": 2,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 7,
    "enable_checkpointing": True,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accumulate_grad_batches": 3,
    "gradient_clip_val": 0.5,
    "gradient_clip_algorithm": "norm",
    "deterministic": False,
    "benchmark": True,
    "inference_mode": False,
    "use_distributed_sampler": False,
    "profiler": "simple",
    "detect_anomaly": False,
    "barebones": True,
    "plugins": MimoPrecision("32-true"),
    "sync_batchnorm": True,
    "reload_dataloaders_every_n_epochs": 1,
    "default_root_dir": "runs",
    "enable_autolog_hparams": False,
    "model_registry": "team/model",
}


def trainer(**options: Any) -> pl.Trainer:
    strategy = MimoStrategy({"images": ModuleParallelism(), "language": ModuleParallelism()}, 8)
    quiet = {} if "barebones" in options else {"logger": False}
    return pl.Trainer(**{**quiet, "accelerator": "cpu", "devices": 2, **options, "strategy": strategy})


@pytest.mark.filterwarnings("ignore:.*GPU available.*", "ignore:You passed `Trainer\\(accelerator='cpu'")
@pytest.mark.parametrize("name", TRAINER)
def test_argument_is_taken_or_refused_as_the_page_says(name: str) -> None:
    connected = trainer(**{name: VALUES[name]})
    if TRAINER[name] == "refused":
        with pytest.raises(ConfigError, match=rf"Trainer\({name}=.* is not supported by MimoStrategy.* Leave it out"):
            connected.strategy.validate(connected)
    else:
        assert TRAINER[name] in ("yes", "no effect")
        assert connected.strategy.validate(connected).world_size == 2


def test_other_accelerators_are_refused() -> None:
    connected = trainer()
    connected.strategy.parallel_devices = [torch.device("meta"), torch.device("meta")]
    with pytest.raises(ConfigError, match=r"selects 'meta', but megatron-core runs on GPUs with CUDA"):
        connected.strategy.validate(connected)


# ---- callbacks

ARGUMENTS: dict[str, dict[str, Any]] = {
    "BasePredictionWriter": {"write_interval": "batch"},
    "DeviceStatsMonitor": {"cpu_stats": True},
    "EarlyStopping": {"monitor": "val/loss"},
    "GradientAccumulationScheduler": {"scheduling": {0: 1}},
    "ModelPruning": {"pruning_fn": "l1_unstructured"},
    "OnExceptionCheckpoint": {"dirpath": "."},
    "StochasticWeightAveraging": {"swa_lrs": 1e-3},
    "ThroughputMonitor": {"batch_size_fn": len},
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_callback_is_taken_or_refused_as_the_page_says(name: str) -> None:
    if name in ("RichProgressBar", "RichModelSummary"):
        pytest.importorskip("rich")
    callback = getattr(callbacks, name)(**ARGUMENTS.get(name, {}))
    connected = trainer()
    connected.callbacks.append(callback)
    if CALLBACKS[name] == "refused":
        with pytest.raises(ConfigError, match=rf"The callback {name} is not supported by MimoStrategy: "):
            connected.strategy.validate(connected)
    else:
        assert CALLBACKS[name] == "yes"
        assert connected.strategy.validate(connected).world_size == 2

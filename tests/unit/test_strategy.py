"""What MimoStrategy refuses before any process exists."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from lightning_mimo import LayoutError, MimoStrategy
from lightning_mimo import ModuleParallelism as Cut
from lightning_mimo.precision import MimoPrecision


def trainer(strategy: MimoStrategy, devices: int = 2, **arguments: object) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False, **arguments)


def strategy(**arguments: object) -> MimoStrategy:
    return MimoStrategy({"images": Cut(), "language": Cut()}, **{"global_batch_size": 8, **arguments})


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("64-true", torch.float64)])
def test_precision_is_taken_over_from_the_trainer(precision: str, dtype: torch.dtype) -> None:
    plugin = trainer(strategy(), precision=precision).precision_plugin
    assert isinstance(plugin, MimoPrecision)
    assert plugin.dtype == dtype


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precision_is_refused_with_what_is_supported(precision: str) -> None:
    with pytest.raises(ValueError, match=rf"precision='{precision}'\) is not supported.*supported: 32-true, 64-true"):
        trainer(strategy(), precision=precision)


def test_wrong_number_of_devices_names_the_right_one() -> None:
    with pytest.raises(LayoutError, match=r"devices=2"):
        trainer(strategy(), devices=1).strategy.validate()


def test_batch_that_does_not_divide_names_the_module_and_what_fits() -> None:
    with pytest.raises(LayoutError, match=r"global_batch_size=8.*'images'.*3 \* 1 = 3.*global_batch_size=6 or 9"):
        trainer(strategy(num_microbatches=3)).strategy.validate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap_param_gather": True}, "Set use_distributed_optimizer=True too"),
        ({"overlap_param_gather": True, "use_distributed_optimizer": True}, "needs overlap_grad_reduce=True"),
    ],
    ids=["no_distributed_optimizer", "no_overlapped_reduction"],
)
def test_ddp_options_that_do_not_go_together_name_the_other_one(options: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(strategy(ddp=DistributedDataParallelConfig(**options))).strategy.validate()


def test_float64_with_the_distributed_optimizer_is_refused() -> None:
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    with pytest.raises(ValueError, match=r"does not work with Trainer\(precision='64-true'\)"):
        trainer(strategy(ddp=ddp), precision="64-true").strategy.validate()


def test_unknown_sample_check_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"check_samples='sometimes'\): choose one of \('first', 'always', 'never'\)"):
        trainer(strategy(check_samples="sometimes")).strategy.validate()


def test_plain_lightning_modules_are_refused_by_name() -> None:
    connected = trainer(strategy()).strategy
    connected.connect(pl.LightningModule())
    with pytest.raises(ValueError, match=r"trains a MimoModule, but got a LightningModule"):
        _ = connected._module

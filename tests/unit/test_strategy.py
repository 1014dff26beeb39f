"""What MimoStrategy refuses before any process exists."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
from megatron.core.distributed import DistributedDataParallelConfig

from lightning_mimo import LayoutError, MimoStrategy
from lightning_mimo import ModuleParallelism as Cut
from lightning_mimo.precision import MimoPrecision


def trainer(strategy: MimoStrategy, devices: int = 2, **arguments: object) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False, **arguments)


def strategy(**arguments: object) -> MimoStrategy:
    return MimoStrategy({"images": Cut(), "language": Cut()}, **{"global_batch_size": 8, **arguments})


def test_precision_32_is_taken_over_from_the_trainer() -> None:
    assert isinstance(trainer(strategy(), precision="32-true").precision_plugin, MimoPrecision)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precision_is_refused_with_what_is_supported(precision: str) -> None:
    with pytest.raises(ValueError, match=rf"precision='{precision}'\) is not supported.*supported: 32-true"):
        trainer(strategy(), precision=precision)


def test_wrong_number_of_devices_names_the_right_one() -> None:
    with pytest.raises(LayoutError, match=r"devices=2"):
        trainer(strategy(), devices=1).strategy.validate()


def test_batch_that_does_not_divide_names_the_module_and_what_fits() -> None:
    with pytest.raises(LayoutError, match=r"global_batch_size=8.*'images'.*3 \* 1 = 3.*global_batch_size=6 or 9"):
        trainer(strategy(num_microbatches=3)).strategy.validate()


def test_overlapped_parameter_gathering_is_refused_by_name() -> None:
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    )
    with pytest.raises(ValueError, match=r"overlap_param_gather=True is not supported yet"):
        trainer(strategy(ddp=ddp)).strategy.validate()


def test_plain_lightning_modules_are_refused_by_name() -> None:
    connected = trainer(strategy()).strategy
    connected.connect(pl.LightningModule())
    with pytest.raises(ValueError, match=r"trains a MimoModule, but got a LightningModule"):
        _ = connected._module

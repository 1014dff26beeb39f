"""What MimoStrategy refuses before any process exists."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.precision import (
    BitsandbytesPrecision,
    MixedPrecision,
    Precision,
    TransformerEnginePrecision,
)
from megatron.core.distributed import DistributedDataParallelConfig

from lightning_mimo import (
    Checks,
    ConfigError,
    LayoutError,
    MimoModule,
    MimoStrategy,
    ModuleParallelism,
    Monitoring,
    Saving,
)
from lightning_mimo.mimo.dtypes import DtypePolicy
from lightning_mimo.strategy.module_check import check_takes_packed
from lightning_mimo.strategy.options import MOVED, key_now
from lightning_mimo.strategy.precision import MimoPrecision


def trainer(strategy: MimoStrategy, devices: int = 2, **arguments: object) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False, **arguments)


def strategy(**arguments: object) -> MimoStrategy:
    return MimoStrategy(
        {"images": ModuleParallelism(), "language": ModuleParallelism()}, **{"global_batch_size": 8, **arguments}
    )


@pytest.mark.parametrize(
    ("precision", "dtype", "mixed"),
    [
        ("32-true", torch.float32, False),
        ("bf16-mixed", torch.bfloat16, True),
        ("bf16-true", torch.bfloat16, False),
        ("64-true", torch.float64, False),
    ],
)
def test_precision_is_taken_over_from_the_trainer(precision: str, dtype: torch.dtype, mixed: bool) -> None:
    plugin = trainer(strategy(), precision=precision).precision_plugin
    assert isinstance(plugin, MimoPrecision)
    assert plugin.dtype_policy == DtypePolicy(dtype=dtype, mixed=mixed)


@pytest.mark.parametrize("plugin", [MimoPrecision("16-mixed"), MixedPrecision("16-mixed", "cpu")], ids=["own", "amp"])
def test_precision_may_be_a_plugin(plugin: Precision) -> None:
    for connected in (trainer(strategy(), plugins=plugin), trainer(strategy(precision_plugin=plugin))):
        assert isinstance(connected.precision_plugin, MimoPrecision)
        assert connected.precision_plugin.dtype_policy == DtypePolicy(dtype=torch.float16, mixed=True)


def test_float16_on_cpus_is_bfloat16_as_lightning_warns() -> None:
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU. Using `precision='bf16-mixed'`"):
        plugin = trainer(strategy(), precision="16-mixed").precision_plugin
    assert plugin.precision == "bf16-mixed"


def test_other_precision_is_refused_with_what_is_supported() -> None:
    message = r"precision='16-true'\) is not supported.*: 32-true, bf16-mixed, bf16-true, 16-mixed, 64-true\."
    with pytest.raises(ValueError, match=message):
        trainer(strategy(), precision="16-true")


@pytest.mark.parametrize("plugin", [TransformerEnginePrecision, BitsandbytesPrecision])
def test_other_plugin_is_refused_by_its_name(plugin: type[Precision]) -> None:
    # Not initialized, because the libraries behind them are not here.
    message = rf"precision='{plugin.__name__}'\) is not supported by MimoStrategy; supported: 32-true, "
    with pytest.raises(ValueError, match=message):
        MimoPrecision.convert(plugin.__new__(plugin))


@pytest.mark.parametrize(("precision", "kept"), [("32-true", torch.float16), ("bf16-mixed", torch.bfloat16)])
def test_inputs_of_encoders_are_given_the_dtype_of_the_run(precision: str, kept: torch.dtype) -> None:
    wide, short = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float16)
    numbers = {"vit": {"wide": wide, "short": short, "grid": torch.ones(2, dtype=torch.int64)}}
    (found,) = MimoPrecision(precision).convert_input([{"modality_inputs": {"images": numbers}}])
    dtypes = {name: tensor.dtype for name, tensor in found["modality_inputs"]["images"]["vit"].items()}
    meant = torch.float32 if precision == "32-true" else torch.bfloat16
    assert dtypes == {"wide": meant, "short": kept, "grid": torch.int64}


@pytest.mark.parametrize("ahead", [-1, 1.5, True])
def test_encoders_run_ahead_by_whole_microbatches(ahead: object) -> None:
    with pytest.raises(ValueError, match=rf"encoder_run_ahead={ahead}\) must be a whole number of microbatches, 0 or"):
        trainer(strategy(encoder_run_ahead=ahead)).strategy.validate()


def test_balance_is_a_choice_of_two() -> None:
    with pytest.raises(ValueError, match=r"balance='off'\) must be True or False"):
        strategy(balance="off")


def test_wrong_number_of_devices_names_the_right_one() -> None:
    with pytest.raises(LayoutError, match=r"devices=2"):
        trainer(strategy(), devices=1).strategy.validate()


def test_batch_that_does_not_divide_names_the_module_and_what_fits() -> None:
    with pytest.raises(LayoutError, match=r"global_batch_size=8.*'images'.*3 \* 1 = 3.*global_batch_size=6 or 9"):
        trainer(strategy(num_microbatches=3)).strategy.validate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap_param_gather": True}, "Set use_distributed_optimizer=True as well"),
        ({"overlap_param_gather": True, "use_distributed_optimizer": True}, "needs overlap_grad_reduce=True"),
        ({"average_in_collective": True}, "gradients are summed"),
        ({"num_distributed_optimizer_instances": 2}, "num_distributed_optimizer_instances=2 is not supported"),
        ({"use_megatron_fsdp": True}, "use_megatron_fsdp=True is not supported"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_ddp_options_that_cannot_be_name_the_module_and_the_remedy(options: dict[str, Any], message: str) -> None:
    ddp = {"language": DistributedDataParallelConfig(**options)}
    with pytest.raises(ValueError, match=rf"MimoStrategy\(ddp=\.\.\.\), module 'language': .*{message}"):
        trainer(strategy(ddp=ddp)).strategy.validate()


@pytest.mark.parametrize(
    ("precision", "instead"), [("64-true", "Omit one of them"), ("bf16-true", "Use precision='bf16-mixed'")]
)
def test_distributed_optimizer_is_refused_where_it_would_keep_float32(precision: str, instead: str) -> None:
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    with pytest.raises(ValueError, match=rf"does not work with Trainer\(precision='{precision}'\).*{instead}"):
        trainer(strategy(ddp=ddp), precision=precision).strategy.validate()


def test_ddp_options_of_a_module_that_is_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no module 'pictures'; the layout has 'images', 'language'"):
        trainer(strategy(ddp={"pictures": DistributedDataParallelConfig()})).strategy.validate()


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        (Checks, {"on_nonfinite": "ignore"}, r"Checks\(on_nonfinite='ignore'\): choose one of \('raise', 'skip'\)"),
        (Checks, {"samples": "some"}, r"Checks\(samples='some'\): choose one of \('first', 'always', 'never'\)"),
        (Saving, {"on_error": "skip"}, r"Saving\(on_error='skip'\): choose one of \('raise', 'warn'\)"),
        (Monitoring, {"timeout": 30}, r"Monitoring\(timeout=30\) must be a positive datetime.timedelta, such as"),
        (Monitoring, {"timeout": timedelta()}, r"Monitoring\(timeout=datetime.timedelta\(0\)\) must be a positive"),
    ],
)
def test_unknown_options_name_the_choices(group: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        group(**values)


@pytest.mark.parametrize("name", MOVED)
def test_arguments_that_have_moved_name_their_new_place(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^MimoStrategy\({name}=\.\.\.\) has moved: write MimoStrategy\("
    ) as refused:
        strategy(**{name: None})
    argument, _, field = key_now(name).partition(".")
    group = type(getattr(strategy(), argument))
    assert f"MimoStrategy({argument}={group.__name__}({field}=...))" in str(refused.value)
    assert field in group.__dataclass_fields__


def test_storage_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"save_checkpoint\(storage_options=\.\.\.\) is not supported: there is no"):
        strategy().save_checkpoint({}, "some.ckpt", storage_options={"region": "north"})


def test_plain_lightning_modules_are_refused_by_name() -> None:
    connected = trainer(strategy()).strategy
    connected.connect(pl.LightningModule())
    with pytest.raises(ValueError, match=r"trains a MimoModule, but got a LightningModule"):
        _ = connected._module


def test_layout_is_checked_on_gpus_before_the_script_is_started_again() -> None:
    connected = strategy()  # for two ranks
    connected.parallel_devices = [torch.device("cuda", index) for index in range(3)]
    connected.cluster_environment = LightningEnvironment()
    connected._configure_launcher()
    with pytest.raises(LayoutError, match="how 3 ranks are to be divided between them is ambiguous"):
        connected.launcher.launch(pytest.fail, "was started")
    assert connected.launcher.procs == []


@pytest.mark.parametrize("tokens", [0, -1, 4096.0, True, "4096"])
def test_a_row_has_a_whole_number_of_tokens(tokens: Any) -> None:
    with pytest.raises(ValueError, match=rf"pack_to={tokens!r}\) must be a whole number of tokens"):
        strategy(pack_to=tokens)


def test_a_loss_of_ones_own_must_say_that_it_takes_packed_rows() -> None:
    class Own(MimoModule):
        def loss(self, output: Any, batch: Any) -> Any:
            return super().loss(output, batch)

    class Takes(Own):
        takes_packed = True

    class Refuses(MimoModule):
        takes_packed = False

    check_takes_packed(MimoModule())
    check_takes_packed(Takes())
    with pytest.raises(ValueError, match=r"Own has its own loss\(\).*takes_packed = True"):
        check_takes_packed(Own())
    with pytest.raises(ValueError, match="Refuses says takes_packed = False"):
        check_takes_packed(Refuses())

"""Every shipped config loads, names classes that exist, and has a layout that can run."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_mimo import LayoutError, MimoModule, MimoStrategy, OptimizerOverride
from lightning_mimo.cli import main, picture_of
from lightning_mimo.models.sizes import Recompute

IMPOSSIBLE = ["--trainer.devices=3", "--trainer.strategy.init_args.modules.images.dp=2"]
CONFIGS = sorted(Path("configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one: LightningCLI warns when it is given arguments beside those of the command line."""
    monkeypatch.setattr(sys, "argv", ["lightning-mimo"])


def load(config: Path, *overrides: str) -> LightningCLI:
    return LightningCLI(
        MimoModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        run=False,
        args=["--config", str(config), *overrides],
    )


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_and_its_layout_can_run(config: Path, tmp_path: Path) -> None:
    cli = load(config, f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.init_args.save_dir={tmp_path}")
    strategy = cli.trainer.strategy
    assert isinstance(strategy, MimoStrategy)
    assert strategy.validate().world_size == strategy.num_processes * strategy.num_nodes


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_says_what_it_shows(config: Path) -> None:
    assert config.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("overrides", "colocated", "dp"),
    [
        (["--trainer.devices=6", "--trainer.strategy.init_args.modules.images.dp=4"], False, 4),
        (["--trainer.strategy.init_args.colocate=true"], True, 4),
    ],
    ids=["six_ranks", "colocated"],
)
def test_dotted_overrides_change_the_layout(overrides: list[str], colocated: bool, dp: int, tmp_path: Path) -> None:
    cli = load(Path("configs/digits_vlm.yaml"), f"--trainer.default_root_dir={tmp_path}", *overrides)
    layout = cli.trainer.strategy.validate()
    assert layout.colocated is colocated
    assert layout.modules["images"].dp == dp
    assert f"dp{dp - 1}" in picture_of(["--config", "configs/digits_vlm.yaml", *overrides])


def test_every_module_has_settings_of_its_own(tmp_path: Path) -> None:
    cli = load(
        Path("configs/digits_vlm.yaml"),
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.precision=bf16-mixed",
        "--trainer.strategy.init_args.ddp={images: {overlap_grad_reduce: true}, language: {bucket_size: 1000}}",
        "--model.init_args.overrides={images: {lr: 1.0e-4}, images.input_projections: {weight_decay: 0, clip_grad: 1}}",
        "--model.init_args.vision.recompute={granularity: selective}",
    )
    ddp = cli.trainer.strategy.ddp_by_module
    assert ddp["images"].overlap_grad_reduce and not ddp["language"].overlap_grad_reduce
    assert ddp["language"].bucket_size == 1000
    assert cli.trainer.precision_plugin.precision == "bf16-mixed"
    assert cli.model.overrides == {
        "images": OptimizerOverride(lr=1e-4),
        "images.input_projections": OptimizerOverride(weight_decay=0.0, clip_grad=1.0),
    }
    assert cli.model.vision.recompute == Recompute(granularity="selective")


def test_an_impossible_layout_is_one_readable_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["layout", "--config", "configs/digits_vlm.yaml", *IMPOSSIBLE])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-mimo: error: Module 'language': 3 ranks - (images 2) leaves 1")
    assert error.count("\n") == 1


def test_fit_refuses_a_layout_before_any_process_starts(tmp_path: Path) -> None:
    cli = load(
        Path("configs/digits_vlm.yaml"),
        *IMPOSSIBLE,
        f"--trainer.default_root_dir={tmp_path}",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    )
    with pytest.raises(LayoutError, match=r"'language': 3 ranks - \(images 2\) leaves 1.*devices=4"):
        cli.trainer.fit(cli.model, cli.datamodule)
    assert not cli.trainer.strategy.launcher._children

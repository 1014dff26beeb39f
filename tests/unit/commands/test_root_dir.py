"""``--trainer.default_root_dir=X`` moves logs and checkpoints of every shipped config to X."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml

from lightning_mimo import MimoModule
from lightning_mimo.commands.config_errors import OneLineParser
from lightning_mimo.commands.run import MimoCLI
from tests.support.tiers import with_default
from tests.unit.commands.test_configs import needs_of

CONFIGS = sorted(Path("configs").glob("*.yaml"))
SAVE_DIR = "--trainer.logger.init_args.save_dir"


@pytest.fixture(autouse=True)
def in_clean_folder(clean_folder: Path) -> None:
    """Loggers count the versions that they find."""


def folders(monkeypatch: pytest.MonkeyPatch, config: Path, *overrides: str) -> tuple[Path, Path]:
    """Where the logger and the checkpoints of a config would go."""
    monkeypatch.setattr(sys, "argv", ["lightning-mimo"])
    cli = MimoCLI(
        MimoModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        parser_class=OneLineParser,
        run=False,
        # Some are for GPUs, which are not here.
        args=["--config", str(config), "--trainer.accelerator=cpu", *overrides],
    )
    trainer = cli.trainer
    trainer.checkpoint_callback.setup(trainer, cli.model, stage="fit")
    return Path(trainer.logger.log_dir), Path(trainer.checkpoint_callback.dirpath)


def below_root(config: Path) -> Path:
    """Folder of the logs below the root, by the logger of the config."""
    logger = yaml.safe_load(config.read_text())["trainer"]["logger"]["init_args"]
    return Path(logger.get("name", "lightning_logs"), logger.get("version", "version_0"))


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_root_dir_moves_logs_and_checkpoints(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs, checkpoints = folders(monkeypatch, config, f"--trainer.default_root_dir={tmp_path}/new", *needs_of(config))
    assert logs == tmp_path / "new" / below_root(config)
    assert checkpoints == logs / "checkpoints"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("stem", with_default([path.stem for path in CONFIGS], {"digits_vlm"}))
def test_without_it_they_are_in_a_folder_named_like_the_config(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Path("configs", f"{stem}.yaml")
    logs, checkpoints = folders(monkeypatch, config, *needs_of(config))
    assert logs.parent == Path("logs", config.stem, below_root(config).parent)
    assert checkpoints == logs / "checkpoints"


def test_folder_that_is_given_itself_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = (f"--trainer.default_root_dir={tmp_path}/new", f"{SAVE_DIR}={tmp_path}/other")
    logs, checkpoints = folders(monkeypatch, CONFIGS[0], *overrides)
    assert logs.parent == tmp_path / "other" / "lightning_logs"
    assert checkpoints == logs / "checkpoints"


def test_folders_below_the_root_move_and_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.yaml"
    text = (
        CONFIGS[0]
        .read_text()
        .replace("{save_dir: logs/", "{save_dir: logs/../logs/")
        .replace('filename: "{step}"', f'dirpath: {tmp_path}/elsewhere, filename: "{{step}}"')
    )
    config.write_text(text)
    logs, checkpoints = folders(monkeypatch, config, f"--trainer.default_root_dir={tmp_path}/new")
    assert logs.parent == tmp_path / "new" / "lightning_logs"
    assert checkpoints == tmp_path / "elsewhere"
    text = text.replace(f"dirpath: {tmp_path}/elsewhere", f"dirpath: logs/{CONFIGS[0].stem}/weights")
    config.write_text(text)
    assert folders(monkeypatch, config, f"--trainer.default_root_dir={tmp_path}/new")[1] == tmp_path / "new" / "weights"

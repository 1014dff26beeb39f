"""The wheel in an empty environment: what pip installs is enough to write a project and to train it.

``uv run pytest -m wheel``; needs uv, and the package index or uv's cache.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path, environment: dict[str, str] | None = None) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def uv(*arguments: str) -> None:
    program = os.environ.get("UV") or shutil.which("uv")  # ``uv run`` tells where it lies itself
    if program is None:
        pytest.skip("there is no uv on the PATH")
    run(program, *arguments, cwd=ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    uv("build", "--wheel", "--out-dir", str(folder))
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path) -> dict[str, str]:
    """Environment variables of a shell in which nothing but the wheel and what it declares is installed."""
    venv = wheel.parent / "venv"
    uv("venv", "--python", "3.12", str(venv))
    uv("pip", "install", "--python", str(venv), str(wheel))
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return environment | {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}


def test_wheel_holds_the_package_and_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = run("git", "ls-files", "lightning_mimo", cwd=ROOT).split()
    assert names == set(tracked)
    assert "lightning_mimo/commands/templates/config.yaml" in names


def test_help_and_layout(installed: dict[str, str], tmp_path: Path) -> None:
    assert "usage: lightning-mimo" in run("lightning-mimo", "--help", cwd=tmp_path, environment=installed)
    config = str(ROOT / "configs" / "digits_vlm.yaml")
    drawn = run("lightning-mimo", "layout", "--config", config, cwd=tmp_path, environment=installed)
    assert "4 ranks, each module on ranks of its own" in drawn


def test_new_project_does_what_its_readme_says(installed: dict[str, str], tmp_path: Path) -> None:
    project = tmp_path / "project"
    run("lightning-mimo", "new", "project", cwd=tmp_path, environment=installed)
    blocks = re.findall(r"^```\n(.*?)^```", (project / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert [shlex.split(command)[1] for command in commands] == ["layout", "fit", "fit", "fit", "validate"]
    said = [run(*shlex.split(command, comments=True), cwd=project, environment=installed) for command in commands]
    assert "images    tp0   .   .\n" in said[0]
    assert "parameters (images " in said[1]
    assert (project / "lightning_logs" / "version_0" / "checkpoints" / "step=160.ckpt").is_dir()
    with (project / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        learned = [float(row["val/exact_match"]) for row in csv.DictReader(file) if row["val/exact_match"]]
    assert len(learned) == 5
    assert learned[-1] > 0.9, "chance is 0.125"
    assert (project / "lightning_logs" / "version_1" / "checkpoints" / "step=320.ckpt").is_dir()
    assert re.search(r"val/exact_match\W+[01]\.\d+", said[4])


def test_whole_numbers_of_batches_are_whole(installed: dict[str, str], tmp_path: Path) -> None:
    """In an environment without other packages, Python gives the types of these numbers in another order."""
    run("lightning-mimo", "new", "project", cwd=tmp_path, environment=installed)
    dry_run = ("lightning-mimo", "fit", "--dry-run=weights", "--config", "config.yaml")
    said = run(*dry_run, "--trainer.limit_val_batches=20", cwd=tmp_path / "project", environment=installed)
    assert "on each rank" in said

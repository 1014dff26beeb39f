"""``lightning-mimo new FOLDER`` writes a project that trains, and never writes over what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mimo.commands.cli import main

ROOT = Path(__file__).parents[3]
TEMPLATES = ROOT / "lightning_mimo" / "commands" / "templates"
NAMES = ["README.md", "config.yaml", "data.py", "fit.sbatch", "model.py"]


def test_says_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my project"
    main(["new", str(folder)])
    said = capsys.readouterr().out
    assert f"cd '{folder}'" in said
    assert "lightning-mimo fit --config config.yaml" in said
    assert sorted(path.name for path in folder.iterdir()) == NAMES


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    main(["new", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES


@pytest.mark.parametrize(
    ("held", "message"),
    [(["notes.txt"], "the folder holds notes.txt; choose"), (["a", "b", "c"], "the folder holds a and 2 more; choose")],
    ids=["one", "three"],
)
def test_folder_that_holds_something_is_refused(
    held: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in held:
        (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        main(["new", str(tmp_path)])
    assert f"lightning-mimo: error: new {tmp_path}: {message}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == held


@pytest.mark.parametrize("arguments", [[], ["--help"], ["one", "two"]], ids=" ".join)
def test_what_is_no_folder_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["new", *arguments])
    assert "lightning-mimo: error: write: new FOLDER" in capsys.readouterr().err


def test_file_and_folder_that_cannot_be_made_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        main(["new", str(file)])
    assert "there is a file of this name" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["new", str(file / "below")])
    assert f"new {file}/below: Not a directory: {file}/below." in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_job_script_is_the_examples() -> None:
    """But for what it says about where it lies."""
    example, template = (ROOT / "examples" / "slurm" / "fit.sbatch").read_text(), (TEMPLATES / "fit.sbatch").read_text()
    begin = "#SBATCH --job-name"
    assert example[example.index(begin) :] == template[template.index(begin) :]

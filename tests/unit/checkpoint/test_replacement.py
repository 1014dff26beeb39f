"""A checkpoint replaces another one atomically, removes nothing else, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightning_mimo.checkpoint import replacement
from lightning_mimo.checkpoint.directory import OWNER, TRAINER, UNFINISHED, describe_file, read_manifest, write_manifest
from lightning_mimo.checkpoint.replacement import discard, make_unfinished, publish, recover
from lightning_mimo.errors import CheckpointError


def written(path: Path, step: int) -> Path:
    """The smallest complete checkpoint, still in its unfinished directory."""
    directory = make_unfinished(path)
    (directory / TRAINER).write_text("")
    write_manifest(
        directory,
        {
            "format": 2,
            "lightning_mimo": "test",
            "layout": None,
            "step": step,
            "epoch": 0,
            "weights_only": True,
            "position": None,
            "world_size": 0,
            "files": {TRAINER: describe_file(directory / TRAINER)},
            "parameters": {},
        },
    )
    return directory


def checkpoint_at(path: Path, step: int) -> None:
    publish(written(path, step), path)


def step_of(path: Path) -> int:
    return read_manifest(path)["step"]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(params=["exchange", "no_exchange"])
def either_file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an atomic exchange of two names, and without one, as on some network file systems."""
    if request.param == "no_exchange":
        monkeypatch.setattr(replacement, "_exchange", lambda one, two: False)


@pytest.mark.usefixtures("either_file_system")
def test_new_checkpoint_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for step in (1, 2):
        checkpoint_at(path, step)
        assert step_of(path) == step
        assert names(tmp_path) == ["last.ckpt"]


@pytest.mark.usefixtures("either_file_system")
@pytest.mark.parametrize("exists", [True, False])
def test_new_checkpoint_replaces_a_link(tmp_path: Path, exists: bool) -> None:
    if exists:
        checkpoint_at(tmp_path / "step=1.ckpt", 1)
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    checkpoint_at(tmp_path / "last.ckpt", 2)
    assert step_of(tmp_path / "last.ckpt") == 2 and not (tmp_path / "last.ckpt").is_symlink()
    assert names(tmp_path) == ["last.ckpt", "step=1.ckpt"][: 1 + exists]
    assert not exists or step_of(tmp_path / "step=1.ckpt") == 1


# ---- nothing is removed that is not a checkpoint


def make(kind: str, path: Path) -> str:
    """Put something that is not a checkpoint at a path. Returns how a refusal names it."""
    if kind == "file":
        path.write_text("mine")
        return "is a file"
    if kind == "folder_with_a_manifest_of_another_kind":
        path.mkdir()
        (path / "checkpoint.json").mkdir()
        return "is a folder, but not a checkpoint"
    if kind == "checkpoint_with_a_note":
        checkpoint_at(path, 1)
        (path / "note.txt").write_text("mine")
        return "contains 'note.txt', which is not of a checkpoint"
    if kind == "checkpoint_with_a_folder":
        checkpoint_at(path, 1)
        (path / "images-rank00000.safetensors").mkdir()
        return "contains 'images-rank00000.safetensors', which is not of a checkpoint"
    if kind == "link_to_a_folder":
        (path.parent / "results").mkdir()
        path.symlink_to("results")
        return "is a folder, but not a checkpoint"
    path.mkdir()
    if kind == "folder":
        (path / "results.csv").write_text("mine")
    return "is a folder, but not a checkpoint"


KINDS = ["file", "folder", "empty", "link_to_a_folder", "folder_with_a_manifest_of_another_kind"]
KINDS += ["checkpoint_with_a_note", "checkpoint_with_a_folder"]


def everything_in(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(entry.relative_to(folder)), entry.lstat().st_ino) for entry in folder.rglob("*"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_checkpoint_is_neither_replaced_nor_removed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "results.ckpt"
    what = make(kind, path)
    before = everything_in(tmp_path)
    with pytest.raises(CheckpointError, match=f"{what}, and saving a checkpoint there would delete it"):
        make_unfinished(path)
    with pytest.raises(CheckpointError, match=f"{what}, so it was not removed"):
        discard(path)
    assert everything_in(tmp_path) == before


def test_what_comes_to_the_path_during_a_save_stays(tmp_path: Path) -> None:
    path = tmp_path / "results.ckpt"
    directory = written(path, 1)
    path.mkdir()
    (path / "results.csv").write_text("mine")
    with pytest.raises(CheckpointError, match="is a folder, but not a checkpoint"):
        publish(directory, path)
    assert names(path) == ["results.csv"]


def test_removal_takes_the_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    checkpoint_at(tmp_path / "step=1.ckpt", 1)
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    discard(tmp_path / "last.ckpt")
    assert names(tmp_path) == ["step=1.ckpt"]
    discard(tmp_path / "step=1.ckpt")
    discard(tmp_path / "step=1.ckpt")  # as after a removal by hand
    assert names(tmp_path) == []


# ---- a kill between two renames, where two names cannot be exchanged


class Killed(BaseException):
    """Stands in for the end of the process."""


@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize("is_link", [False, True])
def test_kill_between_the_renames_loses_no_checkpoint(
    renames: int, is_link: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint_at(tmp_path / "step=1.ckpt" if is_link else path, 1)
    if is_link:
        path.symlink_to("step=1.ckpt")
    directory = written(path, 2)
    monkeypatch.setattr(replacement, "_exchange", lambda one, two: False)
    done = 0

    def rename(self: Path, target: Path) -> None:
        nonlocal done
        if done == renames:
            raise Killed
        done += 1
        os.rename(self, target)  # noqa: PTH104 (the method is replaced)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", rename)
        publish(directory, path)
        raise Killed  # after the last one
    trainer = Trainer(logger=False, callbacks=ModelCheckpoint(tmp_path), accelerator="cpu")
    found = trainer._checkpoint_connector._parse_ckpt_path(TrainerFn.FITTING, "last", True, True)
    assert step_of(Path(found)) == (2 if renames == 2 else 1)
    recover(path)
    assert step_of(path) == (2 if renames == 2 else 1)
    checkpoint_at(path, 3)
    assert step_of(path) == 3
    assert [name for name in names(tmp_path) if name != "step=1.ckpt"] in (["last.ckpt"], ["last.ckpt", UNFINISHED])


# ---- nothing piles up, and two runs share a folder


def test_unfinished_checkpoint_of_a_process_that_has_ended_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    code = f"""if True:
        from pathlib import Path
        from lightning_mimo.checkpoint.replacement import make_unfinished
        print(make_unfinished(Path({str(path)!r})))
    """
    left = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert Path(left).is_dir()
    mine, foreign = tmp_path / UNFINISHED / "mine", tmp_path / UNFINISHED / "other.ckpt.removed"
    for folder in (mine, foreign):
        folder.mkdir()
        (folder / "results.csv").write_text("mine")
    running = make_unfinished(path)
    assert not Path(left).exists()
    assert names(mine) == names(foreign) == ["results.csv"]
    assert make_unfinished(tmp_path / "other.ckpt").is_dir() and running.is_dir(), "of a process that is alive"


def test_unfinished_checkpoint_of_another_machine_is_removed_a_day_later(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    directory = make_unfinished(path)
    owner = json.loads((directory / OWNER).read_text())
    (directory / OWNER).write_text(json.dumps({**owner, "host": "elsewhere", "pid": 1}))
    make_unfinished(path)
    assert directory.is_dir()
    for entry in (directory / OWNER, directory):
        os.utime(entry, (0, 0))
    make_unfinished(path)
    assert not directory.exists()


def test_two_runs_that_save_under_one_name_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    one, two = written(path, 1), written(path, 2)
    publish(two, path)
    assert step_of(path) == 2 and step_of(one) == 1
    publish(one, path)
    assert step_of(path) == 1
    assert names(tmp_path) == ["last.ckpt"]


def test_long_name_has_room_for_what_is_added(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250 + ".ckpt")
    checkpoint_at(path, 1)
    assert step_of(path) == 1

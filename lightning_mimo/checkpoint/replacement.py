"""Unfinished checkpoints, the atomic replacement of an older checkpoint, and removal.

While a checkpoint is being written it is in a directory of its own in the folder ``unfinished`` beside its final path:
``unfinished/step=600.ckpt.5f2c91aa``. Runs that save under the same path do not disturb each other; the last one to
finish replaces the other's checkpoint. Directories that a killed run left there are removed by the next save.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import socket
import time
from pathlib import Path

import psutil

from lightning_mimo.checkpoint.directory import (
    MANIFEST,
    OWNER,
    UNFINISHED,
    flush,
    foreign_entry,
    remove_directory,
    write_json,
)
from lightning_mimo.errors import CheckpointError

_REMOVED = ".removed"  # suffix of a directory that is being removed
_ABANDONED_AFTER = 86_400.0  # seconds without a change, if the process that wrote it cannot be seen from here
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100


def make_unfinished(path: Path) -> Path:
    """Create the directory in which the checkpoint of a path is written before it is complete.

    Raises:
        CheckpointError: if there is something other than a checkpoint at the path.
    """
    check_replaceable(path)
    folder = path.parent / UNFINISHED
    _remove_abandoned(folder)
    directory = _new_name(path)
    directory.mkdir(parents=True)
    write_json(directory / OWNER, _this_process())
    return directory


def check_replaceable(path: Path) -> None:
    """Check that a save to this path would replace nothing but a checkpoint or a link to one.

    Raises:
        CheckpointError: naming what is there.
    """
    if (what := _not_a_checkpoint(path)) is not None:
        raise CheckpointError(
            f"{path} {what}, and saving a checkpoint there would delete it. Save under another name, or move it "
            f"elsewhere."
        )


def _not_a_checkpoint(path: Path) -> str | None:
    """Description of what is at a path, if removing it would remove something that is not of a checkpoint."""
    if not path.exists():
        return None  # also a link whose checkpoint has been removed
    if not path.is_dir():
        return "is a file"
    if not (path / MANIFEST).is_file():
        return "is a folder, but not a checkpoint"
    name = foreign_entry(path)
    return None if name is None else f"contains {name!r}, which is not of a checkpoint"


def publish(directory: Path, path: Path) -> None:
    """Move a complete checkpoint to its final path, replacing an older one.

    If the process is killed meanwhile, the path holds the complete old or the complete new checkpoint. On file systems
    that cannot exchange two names, the old one may be left as ``NAME-before-replacement.ckpt``; see :func:`recover`.

    Args:
        directory: from :func:`make_unfinished`, with all files and the manifest.
        path: final path.

    Raises:
        CheckpointError: if there is something other than a checkpoint at the path.
    """
    (directory / OWNER).unlink(missing_ok=True)
    flush(directory / MANIFEST)
    flush(directory)
    check_replaceable(path)
    before = before_replacement(path)
    if not os.path.lexists(path):
        directory.rename(path)
    elif _exchange(directory, path):
        _remove(directory)
    else:
        _remove(before)
        path.rename(before)
        try:
            directory.rename(path)
        except OSError:
            before.rename(path)
            raise
    flush(path.parent)
    with contextlib.suppress(CheckpointError):  # a folder of this name that is not ours
        _remove(before)
    remove_if_empty(directory.parent)


def before_replacement(path: Path) -> Path:
    """Name of the old checkpoint while the new one takes its name, where the two cannot be exchanged.

    For ``last.ckpt`` it begins with ``last`` and has the same suffix, so ``ckpt_path="last"`` finds it.
    """
    return path.with_name(f"{path.stem}-before-replacement{path.suffix}")


def recover(path: Path) -> None:
    """Restore the checkpoint of a path whose replacement was interrupted between two renames. Call it on one rank."""
    before = before_replacement(path)
    if not os.path.lexists(path) and before.exists():
        with contextlib.suppress(OSError):  # a read-only folder; reading then reports the missing path
            before.rename(path)


def discard(path: Path) -> None:
    """Remove a checkpoint, or a symbolic link to one.

    It is moved to ``unfinished`` first, so that a partly deleted checkpoint cannot be mistaken for a complete one.

    Raises:
        CheckpointError: if there is something else at the path, or in the directory. Nothing is removed then.
    """
    if (what := _not_a_checkpoint(path)) is not None:
        raise CheckpointError(f"{path} {what}, so it was not removed.")
    if path.is_symlink() or not path.exists():
        path.unlink(missing_ok=True)
        return
    aside = _new_name(path, _REMOVED)
    aside.parent.mkdir(exist_ok=True)
    path.rename(aside)
    remove_directory(aside)
    remove_if_empty(aside.parent)


def remove_if_empty(folder: Path) -> None:
    """Remove the folder of unfinished checkpoints unless there are any."""
    with contextlib.suppress(OSError):
        folder.rmdir()  # fails while another checkpoint is being written


def _new_name(path: Path, suffix: str = "") -> Path:
    # A name may have 255 bytes, and a character up to 4.
    return path.parent / UNFINISHED / f"{path.name[:50]}.{secrets.token_hex(4)}{suffix}"


def _remove(path: Path) -> None:
    if not os.path.lexists(path):  # also for a name that is too long, for which Path.is_symlink raises
        return
    if path.is_symlink():
        path.unlink()
    else:
        remove_directory(path)


def _exchange(one: Path, two: Path) -> bool:
    """Swap two names atomically. Returns whether the system supports it: Linux, except on some network file systems."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE) == 0


def _remove_abandoned(folder: Path) -> None:
    """Remove the unfinished checkpoints of processes that have ended."""
    if not folder.is_dir() or folder.is_symlink():
        return
    for directory in sorted(folder.iterdir()):
        with contextlib.suppress(OSError, CheckpointError):  # kept if it is not ours
            if directory.is_dir() and not directory.is_symlink() and _is_abandoned(directory):
                remove_directory(directory)


def _is_abandoned(directory: Path) -> bool:
    if directory.name.endswith(_REMOVED):
        return True
    try:
        owner = json.loads((directory / OWNER).read_text())
        if (owner["host"], owner["namespace"]) == (socket.gethostname(), _pid_namespace()):
            return not _is_alive(int(owner["pid"]), float(owner["started"]))
    except (OSError, ValueError, TypeError, KeyError, psutil.Error):
        pass  # it is being created or published, or its owner is unknown
    newest = max(entry.lstat().st_mtime for entry in [directory, *directory.iterdir()])
    return time.time() - newest > _ABANDONED_AFTER


def _this_process() -> dict[str, str | int | float]:
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "namespace": _pid_namespace(),
        "pid": process.pid,
        "started": process.create_time(),
    }


def _pid_namespace() -> str:
    """Identity of the set of processes that this one sees, because containers number theirs separately."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _is_alive(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1.0
    except psutil.NoSuchProcess:
        return False

"""Writes a checkpoint on all ranks in parallel, in a thread, and moves it to its final path when it is complete.

Every rank writes its files and then a status file. Rank 0 waits for the status files of all ranks, writes the manifest
and renames the directory. No step is a collective, so a checkpoint can be written while the ranks train.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_mimo.checkpoint.directory import (
    FORMAT,
    MANIFEST,
    TRAINER,
    describe_file,
    flush,
    publish,
    unfinished,
    write_json,
)
from lightning_mimo.checkpoint.reader import file_name, parameters_in, write_shards
from lightning_mimo.checkpoint.state import TensorShard
from lightning_mimo.errors import CheckpointWriteError

_WRITING, _WRITTEN, _FAILED = "writing", "written", "failed"


@dataclass(frozen=True, kw_only=True)
class Content:
    """Content that one rank writes. Its tensors are copies on the CPU.

    Attributes:
        shards: module name -> shards.
        trainer: bytes of the file of Lightning's trainer; used on rank 0 only.
        about: entries of the manifest; used on rank 0 only.
    """

    shards: Mapping[str, Collection[TensorShard]]
    trainer: bytes
    about: Mapping[str, Any]


class CheckpointWriter:
    """Writes the checkpoints of a run, at most one at a time."""

    def __init__(self, *, timeout: timedelta) -> None:
        """
        Args:
            timeout: time that rank 0 waits for the files of the other ranks.
        """
        self._timeout = timeout.total_seconds()
        self._thread: ThreadPoolExecutor | None = None
        self._future: Future[None] | None = None
        self._path = Path()

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint was started and :meth:`wait` has not been called since."""
        return self._future is not None

    def begin(self, path: Path, content: Content) -> None:
        """Start to write a checkpoint. Collective over the world. Call :meth:`wait` before starting another one.

        Raises:
            CheckpointWriteError: on every rank, if the directory cannot be created.
        """
        assert self._future is None
        self._path = path

        def make_directory() -> None:
            if dist.get_rank() == 0:
                shutil.rmtree(unfinished(path), ignore_errors=True)
                unfinished(path).mkdir(parents=True)

        together(make_directory, path)
        # Created now, to be renamed on failure: on a full disk no new file could report the failure.
        together(_note(path, dist.get_rank(), _WRITING).touch, path)
        self._thread = self._thread or ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._future = self._thread.submit(_write, path, content, dist.get_rank(), dist.get_world_size(), self._timeout)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if any. Collective over the world.

        Raises:
            CheckpointWriteError: on every rank, if writing failed on any rank.
        """
        if (future := self._future) is not None:
            self._future = None
            together(future.result, self._path)

    def then(self, action: Callable[[], None]) -> None:
        """Run an action on this rank after the checkpoint that is being written, unless that fails.

        If no checkpoint is being written, the action runs immediately.
        """
        if (future := self._future) is None:
            action()
            return

        def after() -> None:
            future.result()
            action()

        assert self._thread is not None, "the checkpoint is written in this thread"
        self._future = self._thread.submit(after)

    def close(self) -> None:
        """End the thread after its current write, without a collective. A later :meth:`begin` starts a new thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None


def _note(path: Path, rank: int, state: str) -> Path:
    """Path of a rank's status file. It is empty until the rank has written all its files, and then lists them."""
    return unfinished(path) / f"rank{rank:05d}.{state}"


def _write(path: Path, content: Content, rank: int, ranks: int, timeout: float) -> None:
    writing = _note(path, rank, _WRITING)
    try:
        files = _write_files(unfinished(path), content, rank)
        write_json(writing, {"files": files, "parameters": parameters_in(content.shards)})
    except Exception:
        writing.rename(_note(path, rank, _FAILED))
        raise
    # Last access of this rank: rank 0 may rename the directory from now on.
    writing.rename(_note(path, rank, _WRITTEN))
    if rank == 0:
        _finish(path, content, ranks, timeout)


def _write_files(directory: Path, content: Content, rank: int) -> dict[str, dict[str, int]]:
    written = []
    for module, shards in content.shards.items():
        if shards:
            written.append(directory / file_name(module, rank))
            write_shards(written[-1], shards)
    if rank == 0:
        written.append(directory / TRAINER)
        written[-1].write_bytes(content.trainer)
    for file in written:
        flush(file)
    return {file.name: describe_file(file) for file in written}


def _finish(path: Path, content: Content, ranks: int, timeout: float) -> None:
    """On rank 0: wait for the status files of all ranks, write the manifest, rename the directory."""
    directory = unfinished(path)
    files: dict[str, Any] = {}
    parameters: dict[str, list[int]] = {}
    deadline = time.monotonic() + timeout
    for rank in range(ranks):
        written = _note(path, rank, _WRITTEN)
        while not written.is_file():
            if _note(path, rank, _FAILED).exists():
                raise OSError(f"rank {rank} failed")
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rank} has not written its files within {timeout:.0f} s")
            time.sleep(0.005)
        said = json.loads(written.read_text())
        files |= said["files"]
        parameters |= said["parameters"]
        written.unlink()
    manifest = {"format": FORMAT, **content.about, "world_size": ranks, "files": files, "parameters": parameters}
    write_json(directory / MANIFEST, manifest)
    publish(path)


def together(step: Callable[[], Any], path: Path) -> None:
    """Run a step on every rank; if it fails on any rank, raise on all. Collective over the world."""
    error = None
    try:
        step()
    except Exception as exception:
        error = f"{type(exception).__name__}: {exception}"
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if failed := {rank: text for rank, text in enumerate(errors) if text}:
        told = "; ".join(f"rank {rank}: {text}" for rank, text in failed.items())
        raise CheckpointWriteError(f"The checkpoint {path} could not be written ({told}).")

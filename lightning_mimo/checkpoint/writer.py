"""Writes a checkpoint on all ranks in parallel, in a thread, and moves it to its final path when it is complete.

Every rank writes its files and then a status file. Rank 0 waits for the status files of all ranks, writes the manifest
and renames the directory. No step is a collective, so a checkpoint can be written while the ranks train.
"""

from __future__ import annotations

import contextlib
import json
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_mimo.checkpoint.directory import (
    TRAINER,
    describe_file,
    file_name,
    flush,
    remove_directory,
    write_json,
    write_manifest,
)
from lightning_mimo.checkpoint.manifest import FORMAT, FileEntry
from lightning_mimo.checkpoint.reader import parameters_in, write_shards
from lightning_mimo.checkpoint.replacement import make_unfinished, publish, remove_if_empty
from lightning_mimo.checkpoint.state import TensorShard
from lightning_mimo.errors import CheckpointError, CheckpointWriteError, MimoError

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
        self._directory = Path()

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint was started and :meth:`wait` has not been called since."""
        return self._future is not None

    def begin(self, path: Path, content: Content) -> None:
        """Start to write a checkpoint. Collective over the world. Call :meth:`wait` before starting another one.

        Raises:
            CheckpointError: on every rank, if there is something other than a checkpoint at the path.
            CheckpointWriteError: on every rank, if the directory cannot be created.
        """
        assert self._future is None
        rank = dist.get_rank()
        self._path = path
        self._directory = together(lambda: make_unfinished(path) if rank == 0 else path, path)[0]
        # Created now, to be renamed on failure: on a full disk no new file could report the failure.
        with self._cleared_on_failure():
            together(_note(self._directory, rank, _WRITING).touch, path)
        self._thread = self._thread or ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._future = self._thread.submit(
            _write, self._directory, path, content, rank, dist.get_world_size(), self._timeout
        )

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if any. Collective over the world.

        Raises:
            CheckpointWriteError: on every rank, if writing failed on any rank.
        """
        if (future := self._future) is not None:
            self._future = None
            with self._cleared_on_failure():
                together(future.result, self._path)

    @contextlib.contextmanager
    def _cleared_on_failure(self) -> Iterator[None]:
        """Remove the files of a checkpoint that could not be written, once no rank writes to it any more."""
        try:
            yield
        except MimoError:
            if dist.get_rank() == 0:
                _clear(self._directory)
            # Not before: the first rank that raises may end the others.
            dist.all_gather_object([None] * dist.get_world_size(), None)
            raise

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


def _note(directory: Path, rank: int, state: str) -> Path:
    """Path of a rank's status file. It is empty until the rank has written all its files, and then lists them."""
    return directory / f"rank{rank:05d}.{state}"


def _write(directory: Path, path: Path, content: Content, rank: int, ranks: int, timeout: float) -> None:
    writing = _note(directory, rank, _WRITING)
    try:
        files = _write_files(directory, content, rank)
        write_json(writing, {"files": files, "parameters": parameters_in(content.shards)})
        # Last access of this rank: rank 0 may rename the directory from now on.
        writing.rename(_note(directory, rank, _WRITTEN))
    except Exception:
        with contextlib.suppress(OSError):  # the directory was removed, which rank 0 sees as well
            writing.rename(_note(directory, rank, _FAILED))
        raise
    if rank == 0:
        try:
            _finish(directory, path, content, ranks, timeout)
        except FileNotFoundError as error:
            if directory.is_dir():
                raise
            raise FileNotFoundError(f"{directory} was removed while the checkpoint was written") from error


def _write_files(directory: Path, content: Content, rank: int) -> dict[str, FileEntry]:
    written = []
    for module, shards in content.shards.items():
        if shards:
            written.append(directory / file_name(module, rank))
            write_shards(written[-1], shards)
    if rank == 0:
        written.append(directory / TRAINER)
        written[-1].write_bytes(content.trainer)
    mode = stat.S_IMODE(_note(directory, rank, _WRITING).stat().st_mode)
    for file in written:
        file.chmod(mode)  # safetensors creates its files for their owner only
        flush(file)
    return {file.name: describe_file(file) for file in written}


def _finish(directory: Path, path: Path, content: Content, ranks: int, timeout: float) -> None:
    """On rank 0: wait for the status files of all ranks, write the manifest, rename the directory."""
    files: dict[str, Any] = {}
    parameters: dict[str, list[int]] = {}
    deadline = time.monotonic() + timeout
    for rank in range(ranks):
        written = _note(directory, rank, _WRITTEN)
        while not written.is_file():
            _check_is_writing(directory, rank)
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rank} has not written its files within {timeout:.0f} s")
            time.sleep(0.005)
        report = json.loads(written.read_text())
        files |= report["files"]
        parameters |= report["parameters"]
        written.unlink()
    manifest: Any = {"format": FORMAT, **content.about, "world_size": ranks, "files": files, "parameters": parameters}
    write_manifest(directory, manifest)
    publish(directory, path)


def _check_is_writing(directory: Path, rank: int) -> None:
    """Raise an OSError if a rank that has not written its files will not do so."""
    if _note(directory, rank, _FAILED).exists():
        raise OSError(f"rank {rank} failed")
    if not directory.is_dir():
        raise FileNotFoundError(directory)


def _clear(directory: Path) -> None:
    with contextlib.suppress(OSError, CheckpointError):
        remove_directory(directory)
        remove_if_empty(directory.parent)


def together[T](step: Callable[[], T], path: Path) -> list[T]:
    """Run a step on every rank and return the results of all; if it fails on any, raise on all. Collective."""
    result: T | None = None
    error: CheckpointError | str | None = None
    try:
        result = step()
    except CheckpointError as exception:
        error = exception
    except Exception as exception:
        error = f"{type(exception).__name__}: {exception}"
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (result, error))
    failed = {rank: error for rank, (_, error) in enumerate(everywhere) if error is not None}
    for error in failed.values():
        if isinstance(error, CheckpointError):
            raise error
    if failed:
        problems = "; ".join(f"rank {rank}: {error}" for rank, error in failed.items())
        raise CheckpointWriteError(f"The checkpoint {path} could not be written ({problems}).")
    return [result for result, _ in everywhere]

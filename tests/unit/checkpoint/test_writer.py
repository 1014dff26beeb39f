"""What rank 0 does while it waits for the files of other ranks."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_mimo.checkpoint.replacement import make_unfinished
from lightning_mimo.checkpoint.writer import Content, _note, _write


@pytest.mark.parametrize(
    ("what", "message"), [("removed", "was removed while the checkpoint was written"), ("failed", "rank 1 failed")]
)
def test_wait_for_a_rank_that_will_not_write_ends_at_once(tmp_path: Path, what: str, message: str) -> None:
    path = tmp_path / "some.ckpt"
    directory = make_unfinished(path)
    for rank in (0, 1):
        _note(directory, rank, "writing").touch()
    content = Content(shards={}, trainer=b"", about={})
    with ThreadPoolExecutor(1) as thread:
        save = thread.submit(_write, directory, path, content, 0, 2, 600.0)
        while _note(directory, 0, "writing").exists() and not save.done():
            time.sleep(0.001)
        if what == "removed":
            shutil.rmtree(directory.parent)
        else:
            _note(directory, 1, "writing").rename(_note(directory, 1, "failed"))
        with pytest.raises(OSError, match=message):
            save.result(timeout=20)

"""Random access to the lines of a JSON-lines file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


class JsonLines:
    """The records of a file with one JSON value per line, read one at a time.

    Args:
        file: path of the file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        # Byte offset of each line, so that single records can be read.
        with file.open("rb") as lines:
            lengths = [len(line) for line in lines]
        self._begins = np.cumsum([0, *lengths[:-1]]) if lengths else np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Any:
        with self.file.open("rb") as lines:
            lines.seek(int(self._begins[index]))
            return json.loads(lines.readline())

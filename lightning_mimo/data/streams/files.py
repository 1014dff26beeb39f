"""Names of shards on disk: patterns, braces, and what is no local file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lightning_mimo.errors import ConfigError

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_REMOTE = re.compile(r"^([a-z0-9]+:|\w+://)")


def shard_files(shards: str | Path | Sequence[str | Path], *, kind: str) -> list[Path]:
    """Paths of the shards that a pattern, or a list of patterns, stands for.

    Example: ``"train-{000..002}.tar"`` are three files, ``"data/*.tar"`` all of a folder, in the order of their names.

    Args:
        shards: what the user wrote.
        kind: of the shards, for messages, such as "tar".

    Raises:
        ConfigError: if there is no such file, one is named twice, or one is not on disk.
    """
    given = [shards] if isinstance(shards, str | Path) else list(shards)
    files = [file for each in given for name in expand_braces(str(each)) for file in _matching(name, kind)]
    if not files:
        raise ConfigError(f"There are no {kind} shards: the list of files is empty.")
    file, times = Counter(files).most_common(1)[0]
    if times > 1:
        raise ConfigError(
            f"The {kind} shard {file} is named {times} times, so its samples would be learned from as often."
        )
    return files


def expand_braces(name: str) -> list[str]:
    """``"a-{08..10}"`` -> ``["a-08", "a-09", "a-10"]``, as webdataset and a shell write it."""
    found = _BRACES.search(name)
    if found is None:
        return [name]
    first, last = found[1], found[2]
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    numbers = range(int(first), int(last) + 1)
    return [
        each
        for number in numbers
        for each in expand_braces(f"{name[: found.start()]}{number:0{width}d}{name[found.end() :]}")
    ]


def _matching(name: str, kind: str) -> list[Path]:
    if _REMOTE.match(name):
        raise ConfigError(
            f"The {kind} shard {name!r} is not on disk, but any sample of a shard must be readable at any time. Mount "
            f"or download it, or use an IterableDataset that streams it."
        )
    found = matching_files(name)
    if not found or not found[0].is_file():
        raise ConfigError(f"There is no {kind} shard {'that matches ' if '*' in name else ''}{name!r}.")
    return found


def matching_files(pattern: str) -> list[Path]:
    """Paths that match a pattern with ``*``, in the order of their names; a name without is a path, there or not."""
    if "*" not in pattern:
        return [Path(pattern)]
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if "*" in part)
    return sorted(Path(*parts[:first]).glob("/".join(parts[first:])))

"""``lightning-mimo new FOLDER``: a small project that trains as it stands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lightning_mimo.errors import ConfigError

_NEXT = """{folder}: wrote {names}

Next:
  cd {path}
  lightning-mimo layout --config config.yaml   # which module is on which ranks; starts nothing
  lightning-mimo fit --config config.yaml      # train, in seconds on a CPU
"""


def new_project(arguments: Sequence[str]) -> str:
    """Write a config, a model, data, a job script and a README into a new folder.

    Args:
        arguments: the folder. It may exist if it is empty.

    Returns:
        What to do next.

    Raises:
        ConfigError: naming the folder, if it holds something or cannot be written.
    """
    if len(arguments) != 1 or not arguments[0] or arguments[0].startswith("-"):
        raise ConfigError("write: new FOLDER, with the name of a folder that is not there yet.")
    folder = Path(arguments[0])
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"new {folder}: there is a file of this name; choose another.")
        if folder.is_dir() and (held := sorted(path.name for path in folder.iterdir())):
            more = f" and {len(held) - 1} more" if len(held) > 1 else ""
            raise ConfigError(f"new {folder}: the folder holds {held[0]}{more}; choose one that is empty or not there.")
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(_write_templates(folder))
    except OSError as error:
        raise ConfigError(f"new {folder}: {error.strerror}: {error.filename}.") from error
    return _NEXT.format(folder=folder, names=", ".join(names), path=shlex.quote(str(folder))).rstrip()


def _write_templates(folder: Path) -> list[str]:
    names = []
    for template in files("lightning_mimo.commands").joinpath("templates").iterdir():
        if template.is_file():
            with (folder / template.name).open("xb") as file:  # never over a file that came in between
                file.write(template.read_bytes())
            names.append(template.name)
    return names

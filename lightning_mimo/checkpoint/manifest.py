"""Manifest of a checkpoint: its fields, their checks, and its own checksum."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypedDict, cast

from lightning_mimo.data.data_state import DataState
from lightning_mimo.errors import CheckpointError

FORMAT = 2
"""Version of the format. Format 1 has no checksum of the manifest; it can be read, but is not written."""
_CHECKSUM = "crc32"
_AXES = ("tp", "cp", "pp", "dp", "ep", "expt_tp")
_FILE = re.compile(r"trainer\.pt|[^\W\d]\w*-rank\d{5,}\.safetensors")


class FileEntry(TypedDict):
    """Size in bytes and CRC-32 of a file."""

    bytes: int
    crc32: int


class Manifest(TypedDict):
    """Content of ``checkpoint.json``.

    Attributes:
        format: version of the format.
        lightning_mimo: version of the package, or the origin of an imported checkpoint.
        layout: layout of the run that wrote it; ``None`` for an imported checkpoint.
        step: optimizer steps done.
        epoch: epoch in which it was saved.
        weights_only: whether it has no optimizer state.
        position: fields of the DataState; ``None`` if the run did not train.
        world_size: number of ranks that wrote it; 0 for an imported checkpoint.
        files: name -> size and checksum of every other file.
        parameters: global name -> full shape of every parameter.
    """

    format: int
    lightning_mimo: str
    layout: dict[str, Any] | None
    step: int
    epoch: int
    weights_only: bool
    position: dict[str, Any] | None
    world_size: int
    files: dict[str, FileEntry]
    parameters: dict[str, list[int]]


def manifest_text(manifest: Manifest) -> str:
    """JSON text of a manifest, with its checksum."""
    return json.dumps({**manifest, _CHECKSUM: _checksum(cast(dict[str, Any], manifest))}, indent=1)


def manifest_from(data: bytes, file: Path) -> Manifest:
    """Read a manifest and check its checksum, and the type and range of every field.

    Args:
        data: content of the file.
        file: its path, for messages.

    Raises:
        CheckpointError: naming the field.
    """
    try:
        content = json.loads(data.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is damaged: it must be a JSON object.")
    version = content.get("format")
    if version not in (1, FORMAT) or not _is_count(version):
        raise CheckpointError(
            f"{file.parent} has format {version!r}, but this version of lightning-mimo reads formats 1 to {FORMAT}. "
            f"It was written by version {content.get('lightning_mimo')}."
        )
    if version > 1 and (saved := content.pop(_CHECKSUM, None)) != (found := _checksum(content)):
        raise CheckpointError(f"{file} is damaged: its checksum is {found}, but it was written with {saved!r}.")
    problem = next(_problems(content), None) if set(content) == set(Manifest.__annotations__) else _key_problem(content)
    if problem is not None:
        raise CheckpointError(f"{file} is damaged: {problem}.")
    return cast(Manifest, content)


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _key_problem(content: Mapping[str, Any]) -> str:
    if missing := sorted(set(Manifest.__annotations__) - set(content)):
        return f"it has no {missing[0]!r}"
    return f"it has {sorted(set(content) - set(Manifest.__annotations__))[0]!r}, which is not of this format"


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield a description of each field with a wrong type or value."""
    for field, (is_valid, expected) in _FIELDS.items():
        if not is_valid(content[field]):
            yield f"{field} is {_short(content[field])}, but must be {expected}"
            return
    modules = {name.partition(".")[0] for name in content["parameters"]}
    stored = {name.partition("-rank")[0] for name in content["files"]}
    if "trainer.pt" not in stored:
        yield "files has no 'trainer.pt'"
    for module in sorted(modules ^ (stored - {"trainer.pt"})):
        # A module that is shared with another one, or whose only rank keeps random generators, has no parameters.
        if module in modules:
            yield f"files has no file of module {module!r}"
        elif content["layout"] is None or module not in content["layout"]["modules"]:
            yield f"files has a file of {module!r}, but parameters has none of it"
    yield from _layout_problems(content)
    if not content["weights_only"] and (content["layout"] is None or content["position"] is None):
        yield "weights_only is false, but layout or position is missing"


def _layout_problems(content: Mapping[str, Any]) -> Iterator[str]:
    if content["layout"] is None:
        return
    last = max((sizes["ranks"][1] for sizes in content["layout"]["modules"].values()), default=0)
    if last != content["world_size"]:
        yield f"layout ends at rank {last}, but world_size is {content['world_size']}"
    for module in {name.partition(".")[0] for name in content["parameters"]} - set(content["layout"]["modules"]):
        yield f"parameters has module {module!r}, which is not in layout"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_layout(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or set(value) != {"colocated", "modules"} or type(value["colocated"]) is not bool:
        return False
    modules = value["modules"]
    return isinstance(modules, dict) and all(
        isinstance(sizes, dict)
        and set(sizes) == {"ranks", *_AXES}
        and all(_is_count(sizes[axis]) and sizes[axis] > 0 for axis in _AXES)
        and isinstance(sizes["ranks"], list)
        and len(sizes["ranks"]) == 2
        and all(map(_is_count, sizes["ranks"]))
        and sizes["ranks"][0] < sizes["ranks"][1]
        for sizes in modules.values()
    )


def _is_data_state(value: object) -> bool:
    if value is None:
        return True
    counts = {field.name for field in fields(DataState) if field.type == "int"}
    required = {field.name for field in fields(DataState) if field.default is MISSING}
    return (
        isinstance(value, dict)
        and required <= set(value) <= {field.name for field in fields(DataState)}
        and all(_is_count(value[name]) for name in counts & set(value))
    )


def _is_files(value: object) -> bool:
    return isinstance(value, dict) and all(
        _FILE.fullmatch(name)
        and isinstance(entry, dict)
        and set(entry) == {"bytes", "crc32"}
        and all(map(_is_count, entry.values()))
        and entry["crc32"] < 2**32
        for name, entry in value.items()
    )


def _is_parameters(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(shape, list) and all(map(_is_count, shape)) and name.partition(".")[0].isidentifier()
        for name, shape in value.items()
    )


_COUNT = (_is_count, "a whole number of at least 0")
_FIELDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "format": _COUNT,
    "lightning_mimo": (lambda value: isinstance(value, str), "a version"),
    "layout": (_is_layout, "null or the layout of a run"),
    "step": _COUNT,
    "epoch": _COUNT,
    "weights_only": (lambda value: type(value) is bool, "true or false"),
    "position": (_is_data_state, "null or a position in the training data"),
    "world_size": _COUNT,
    "files": (_is_files, "name -> {bytes, crc32} of the files of a checkpoint"),
    "parameters": (_is_parameters, "module.parameter -> shape"),
}

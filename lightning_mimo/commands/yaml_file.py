"""Reads config files, and refuses what YAML accepts but no config means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_mimo.errors import ConfigError

_LARGEST_FILE = 1 << 22  # bytes
_MOST_VALUES = 1_000_000
_SECTIONS = ("trainer", "model", "data")


def read_yaml(path: str) -> dict[str, Any]:
    """Read a config file.

    Raises:
        ConfigError: if the file does not exist, or is not YAML with keys and values; if a key occurs twice, where YAML
            would use the last value; if values refer to themselves, or to others so often that they cannot be expanded;
            or if a section or an ``init_args`` is empty. The message names the line or the key.
    """
    file = Path(path)
    try:
        if not file.is_file():
            raise ConfigError(f"--config {path}: there is no such file.")
        if (size := file.stat().st_size) > _LARGEST_FILE:
            raise ConfigError(f"--config {path} has {size:,} bytes, too many for a config.")
        text = file.read_text()
    except ConfigError:
        raise
    except ValueError as error:  # bytes that are no text, or a path with a null character
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}.") from error
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}.") from error
    config = read_value(text, f"--config {path}")
    if not isinstance(config, dict | None):
        raise ConfigError(
            f"--config {path} must hold keys and values, such as 'trainer: ...', but it is {_short(config)}."
        )
    config = config or {}
    for problem in _problems(config):
        raise ConfigError(f"--config {path}: {problem}")
    return config


def read_value(text: str, what: str) -> Any:
    """Read YAML text.

    Args:
        text: a config, or the value of a key.
        what: the text's name in messages.

    Raises:
        ConfigError: as for :func:`read_yaml`.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded_size(node, {}, set())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{what} is not YAML: {where}{error.problem}.") from error
    except RecursionError as error:
        raise ConfigError(f"{what} is not a config: its values are nested too deeply.") from error
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:
        raise ConfigError(f"{what} is not YAML: {' '.join(str(error).split())}.") from error


def _expanded_size(node: yaml.Node, known: dict[int, int], open_nodes: set[int]) -> int:
    """Number of values of a node if every reference is replaced by what it refers to. Refuses doubled keys, too."""
    if id(node) in open_nodes:
        raise _error(node, "a value refers to itself")
    if id(node) in known:
        return known[id(node)]
    open_nodes.add(id(node))
    size = 1
    for child in _children(node):
        size += _expanded_size(child, known, open_nodes)
        if size > _MOST_VALUES:
            raise _error(node, f"its references expand to more than {_MOST_VALUES:,} values")
    open_nodes.remove(id(node))
    known[id(node)] = size
    return size


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise _error(key, f"the key {key.value!r} occurs twice")
                seen.add(key.value)
            yield key
            yield value


def _error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _problems(config: dict[str, Any]) -> Iterator[str]:
    """Yield sections without content, and keys that are not words."""
    for section in _SECTIONS:
        if section in config and not isinstance(config[section], dict):
            yield f"{section} must have keys and values, but is {_short(config[section])}."
    yield from _problems_below(config, "")


def _problems_below(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, list):
        for i, each in enumerate(value):
            yield from _problems_below(each, f"{place}[{i}]")
    elif isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str) or not key.strip():
                yield f"{place or 'the config'} has the key {key!r}, but keys are words."
            elif key == "init_args" and not isinstance(each, dict):
                yield (
                    f"{place}.init_args must have keys and values, but is {_short(each)}; write them below it, or "
                    f"leave init_args out."
                )
            else:
                yield from _problems_below(each, f"{place}.{key}" if place else key)


def _short(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"

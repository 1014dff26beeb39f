"""Which of several prefixes the tensors of files have: transformers has changed its names over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_mimo.errors import CheckpointError


def is_used(prefix: str, names: Mapping[str, object]) -> bool:
    """Whether one of the tensors has the prefix."""
    return any(name.startswith(prefix) for name in names)


def first_used(prefixes: Sequence[str], names: Mapping[str, object]) -> str:
    """The first prefix that a tensor has.

    Raises:
        CheckpointError: if no tensor has any of them.
    """
    for prefix in prefixes:
        if is_used(prefix, names):
            return prefix
    raise CheckpointError(f"There are no tensors whose names begin with {' or '.join(map(repr, prefixes))}.")

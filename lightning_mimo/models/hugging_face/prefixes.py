"""Which of several prefixes the tensors of files have: transformers has changed its names over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def is_used(prefix: str, names: Mapping[str, object]) -> bool:
    """Whether one of the tensors has the prefix."""
    return any(name.startswith(prefix) for name in names)


def first_used(prefixes: Sequence[str], names: Mapping[str, object]) -> str:
    """The first prefix that a tensor has; where none has any, as in a LLaVA without a projector, the first of all."""
    return next((prefix for prefix in prefixes if is_used(prefix, names)), prefixes[0])

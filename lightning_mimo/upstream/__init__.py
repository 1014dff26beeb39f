"""What is private in Lightning, torch, megatron-core and transformers and used all the same: each name and the reason.

Functions and classes are imported from here. Attributes, and methods that a subclass overrides, are used where they
are needed and listed here. Those that ``cpu.py`` replaces are listed there. Each module imports its own library only.
"""

from __future__ import annotations

from typing import NamedTuple


class Attribute(NamedTuple):
    """A private attribute or method, or one of a private class.

    Attributes:
        owner: the class or module that has it, by its full name.
        name: the attribute.
        reason: what it is needed for.
    """

    owner: str
    name: str
    reason: str

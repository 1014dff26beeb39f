"""What a rank does once in a pass, before it waits for another one."""

from __future__ import annotations

from collections.abc import Callable


class OnFirstWait:
    """Runs an action once per training pass, before the rank waits for its first receive."""

    def __init__(self, action: Callable[[], None] | None = None) -> None:
        """
        Args:
            action: the action; must not raise and must not wait for other ranks. ``None`` does nothing.
        """
        self._action = action
        self._is_due = False

    def begin(self, *, is_due: bool) -> None:
        """Begin a pass.

        Args:
            is_due: whether the action runs in this pass.
        """
        self._is_due = is_due

    def do(self) -> None:
        """Run the action if it is due and has not run in this pass."""
        if self._is_due and self._action is not None:
            self._is_due = False
            self._action()

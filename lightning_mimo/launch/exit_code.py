"""The exit code that this process is about to end with, known before the interpreter has ended."""

from __future__ import annotations

import sys
import threading
from types import CodeType

_TOOLS = (4, 3)  # of sys.monitoring: the numbers that it reserves for nobody


class ExitCode:
    """Watches which exception leaves the outermost function of the main thread.

    ``sys.last_exc`` tells of all exceptions but SystemExit, and nothing in Python tells an exit handler of that one. A
    forked rank leaves from an exit handler, and its code must be that of ``sys.exit(3)``.
    """

    def __init__(self) -> None:
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
        self._outermost = frame.f_code
        self._code = 0
        monitoring = sys.monitoring
        self._tool = next((tool for tool in _TOOLS if monitoring.get_tool(tool) is None), None)
        if self._tool is not None:
            monitoring.use_tool_id(self._tool, "lightning-mimo")
            monitoring.register_callback(self._tool, monitoring.events.PY_UNWIND, self._unwound)

    @property
    def code(self) -> int:
        """To be read in an exit handler."""
        return self._code or (1 if getattr(sys, "last_exc", None) is not None else 0)

    def watch(self, wanted: bool) -> None:
        """Start or stop. Exceptions cost some time while this watches, so it does not during a run."""
        if self._tool is not None:
            sys.monitoring.set_events(self._tool, sys.monitoring.events.PY_UNWIND if wanted else 0)

    def _unwound(self, code: CodeType, offset: int, error: BaseException) -> None:
        if code is self._outermost and threading.current_thread() is threading.main_thread():
            self._code = code_of(error)


def code_of(error: BaseException) -> int:
    """The exit code of a process that ends because of an exception."""
    if not isinstance(error, SystemExit):
        return 1
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    return 1

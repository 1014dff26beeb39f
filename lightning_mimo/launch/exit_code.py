"""Determines the exit code of this process before the interpreter has exited."""

from __future__ import annotations

import sys
import threading
from types import CodeType

_TOOLS = (4, 3)  # tool ids that sys.monitoring does not reserve


class ExitCode:
    """Records which exception leaves the outermost function of the main thread.

    ``sys.last_exc`` is set for all exceptions except SystemExit, and Python does not pass the code of ``sys.exit(3)``
    to exit handlers. A forked rank ends in an exit handler and needs that code.
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
        """Exit code of this process. Read it in an exit handler."""
        return self._code or (1 if getattr(sys, "last_exc", None) is not None else 0)

    def watch(self, wanted: bool) -> None:
        """Start or stop recording. It makes exceptions slower, so it is stopped during a run."""
        if self._tool is not None:
            sys.monitoring.set_events(self._tool, sys.monitoring.events.PY_UNWIND if wanted else 0)

    def _unwound(self, code: CodeType, offset: int, error: BaseException) -> None:
        if code is self._outermost and threading.current_thread() is threading.main_thread():
            self._code = code_of(error)


def code_of(error: BaseException) -> int:
    """Exit code of a process that ends because of an exception."""
    if not isinstance(error, SystemExit):
        return 1
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    return 1

"""Prints the text of commands that only report something."""

from __future__ import annotations

import os
import sys

_BROKEN_PIPE = 128 + 13  # exit code of a process that SIGPIPE ends


def print_report(text: str) -> None:
    """Print a text to stdout, which may be a pipe whose reader has ended, as in ``... | head``.

    Raises:
        SystemExit: with code 141 if the reader has ended.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The interpreter flushes stdout at exit and would report the same error once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_BROKEN_PIPE)

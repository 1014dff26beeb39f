"""Names the lines of Python that a rank executes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType

import torch

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parent)
# Not what stands in for a GPU, but what is run on it.
_RUN = ("model.py", "faults.py")
_ROOTS = (str(Path(__file__).parents[2]), str(Path(_TORCH).parent))
_DEPTH = 4

Place = tuple[CodeType, int]
"""A line: its code object and its number."""


def innermost() -> Place | None:
    """The innermost line outside of torch and of this folder. Cheap: it formats nothing."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _counts(frame.f_code):
            return frame.f_code, frame.f_lineno
        frame = frame.f_back
    return None


def where() -> str:
    """The innermost lines outside of torch: ``file:line function < file:line function``."""
    lines: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(lines) < _DEPTH:
        if _counts(frame.f_code):
            lines.append(describe((frame.f_code, frame.f_lineno)))
        frame = frame.f_back
    if lines:
        return " < ".join(lines)
    node = torch._C._current_autograd_node()
    return "the backward pass" if node is None else f"the backward pass of {node.name()}"


def describe(place: Place | None) -> str:
    """``file:line function``, with the file relative to the repository or to site-packages."""
    if place is None:
        return "the backward pass"
    code, line = place
    file = code.co_filename
    # The repository first, unless the environment lies within it.
    for root in sorted(_ROOTS, key=len, reverse=True):
        if file.startswith(f"{root}/"):
            file = file.removeprefix(f"{root}/")
            break
    return f"{file}:{line} {code.co_name}"


def raised_at(error: BaseException) -> str:
    """The innermost line outside of torch and of this folder that raised an error: ``file:line function``."""
    place, step = None, error.__traceback__
    while step is not None:
        if _counts(step.tb_frame.f_code):
            place = step.tb_frame.f_code, step.tb_lineno
        step = step.tb_next
    return "a line of torch" if place is None else describe(place)


def _counts(code: CodeType) -> bool:
    file = code.co_filename
    # Modes, such as the one that counts operations, stand between an operation and the line that asks for it.
    if file.startswith("<") or file.startswith(_TORCH) or code.co_name == "__torch_dispatch__":
        return False
    return not file.startswith(_OWN) or file.endswith(_RUN)

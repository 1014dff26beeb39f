"""Draws digit images and answers as plain text, for a terminal or a log file."""

from __future__ import annotations

import numpy as np

# Two columns per pixel, because terminal cells are about twice as high as wide; shades need no colour.
_SHADES = " ░▒▓█"
_COLUMNS_PER_PIXEL = 2
_GAP = "   "


def draw(images: np.ndarray) -> str:
    """Draw images side by side.

    Args:
        images: [k, 8, 8] with values 0..16, ink high.

    Returns:
        Eight lines of equal width, without a final newline.
    """
    levels = np.rint(np.asarray(images) / 16 * (len(_SHADES) - 1)).astype(int)
    rows = levels.transpose(1, 0, 2)
    return "\n".join(_GAP.join(map(_draw_row, row)) for row in rows)


def _draw_row(levels: np.ndarray) -> str:
    return "".join(_SHADES[level] * _COLUMNS_PER_PIXEL for level in levels)


def show_sample(images: np.ndarray, question: str, answer: str, expected: str) -> str:
    """Compose one sample for printing: its images, the question, and the model's answer beside the true one.

    Args:
        images: [k, 8, 8] with values 0..16.
        question: name of the question, such as "SUM".
        answer: answer of the model; may be empty.
        expected: the right answer.

    Returns:
        Nine lines, the last one such as "question: SUM   model: 12   truth: 12   right".
    """
    verdict = "right" if answer == expected else "WRONG"
    words = f"question: {question:<4}   model: {answer or '-':<2}   truth: {expected:<2}   {verdict}"
    return f"{draw(images)}\n{words}"

"""The table of ``pytest -m hugging_face``, and what transformers makes of each model, once for all of its layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.hugging_face.comparison import Differences, Pretrained

_LINES = pytest.StashKey[list[str]]()
_HEAD = (
    f"{'model':18} {'layout':44} ranks {'logits':>8} {'loss':>8} {'gradient':>8} {'weight':>8} {'export':>8}  answers"
)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LINES] = []


@pytest.fixture
def add_line(pytestconfig: pytest.Config) -> Callable[[str, str, int, Differences], None]:
    """Adds a line to the table."""

    def add(model: str, layout: str, ranks: int, found: Differences) -> None:
        figures = (found.logits, found.loss, found.gradient, found.weight, found.export)
        answers = "equal" if found.answers_are_equal else "DIFFER"
        numbers = " ".join(f"{each:8.1e}" for each in figures)
        pytestconfig.stash[_LINES].append(f"{model:18} {layout:44} {ranks:5} {numbers}  {answers}")

    return add


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pretrained]:
    """A model's folder, samples for it, and what transformers makes of them."""
    from tests.hugging_face.comparison import make_pretrained

    made: dict[str, Pretrained] = {}

    def get(kind: str) -> Pretrained:
        if kind not in made:
            made[kind] = make_pretrained(kind, Path(tmp_path_factory.mktemp("models"), kind))
        return made[kind]

    return get


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[_LINES] and config.option.markexpr == "hugging_face":
        terminalreporter.section("largest relative difference from transformers, float64")
        for line in [_HEAD, *config.stash[_LINES]]:
            terminalreporter.line(line)

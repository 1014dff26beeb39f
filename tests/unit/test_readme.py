"""What the README quotes is what there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

README = Path("README.md").read_text()
FAQ = README[README.index("### When it says no") : README.index("## What is supported")]
QUOTED = [message for message in re.findall(r"^\| `(.+?)` \|", FAQ, flags=re.MULTILINE) if message != "message"]


def messages_of(path: Path) -> list[str]:
    """All texts in a file, with … for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


MESSAGES = [message for path in Path("lightning_mimo").rglob("*.py") for message in messages_of(path)]


def test_there_are_ten_messages() -> None:
    assert len(QUOTED) == 10


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_message_is_one_of_the_packages(message: str) -> None:
    pattern = ".*".join(re.escape(words) for words in message.split("…"))
    assert any(re.search(pattern, known) for known in MESSAGES)


def test_own_model_is_the_file_and_has_forty_lines() -> None:
    start = README.index("```python\n", README.index("## Bring your own model in 40 lines")) + len("```python\n")
    block = README[start : README.index("```", start)]
    file = Path("examples/torch_encoder.py").read_text()
    assert block == file[file.index("import lightning") :]
    assert len(block.splitlines()) <= 40


def test_every_example_is_named() -> None:
    for path in Path("examples").glob("[!_]*.py"):
        assert f"`{path.name}`" in README

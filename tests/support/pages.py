"""README and the documentation as tests see them: pages, fenced blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").rglob("*.md"))]

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
_SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
_INLINE = re.compile(r"`(uv (?:run|sync|build|publish)\b[^`]*|lightning-mimo \w+ --[^`]*)`")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: where it stands.
        line: of the page on which its text begins, counted from 1.
        language: after the fence; empty for commands.
        text: without the indentation of the fence, what it includes from files in place.
    """

    page: Path
    line: int
    language: str
    text: str


def blocks_of(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages; an empty string is a fence without one, which holds commands."""
    text = page.read_text()
    found = [
        Block(
            page=page,
            line=text.count("\n", 0, match.start("text")) + 1,
            language=match["language"],
            text=_SNIPPET.sub(lambda snippet: Path(snippet[1]).read_text(), textwrap.dedent(match["text"])),
        )
        for match in _FENCE.finditer(text)
    ]
    return [block for block in found if not languages or block.language in languages]


def commands_of(page: Path) -> list[list[str]]:
    """Every command of a page, in words: those of blocks, and those in the text that can be run as they stand."""
    outside = _FENCE.sub("", page.read_text())
    inline = [shlex.split(command) for command in _INLINE.findall(outside)]
    return [command for block in blocks_of(page, "") for command in commands_in(block)] + inline


def commands_in(block: Block) -> list[list[str]]:
    """The commands of one block, in words."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(part) for line in lines for part in line.split(" && ") if part.strip()]


def run_blocks(page: Path) -> dict[str, Any]:
    """Run the Python blocks of a page, each with the names of those before; ``__main__`` does not run.

    Returns:
        The names that they define.
    """
    # A module that can be imported: parsers of command lines look for all subclasses of a class by their names.
    module = ModuleType(f"blocks_of_{re.sub(r'[^a-z]', '_', str(page).lower())}")
    sys.modules[module.__name__] = module
    names = vars(module)
    for block in blocks_of(page, "python"):
        # Empty lines, so that a traceback shows the line of the page.
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
    return names

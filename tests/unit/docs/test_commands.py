"""Every command of README and the documentation is one that this package, its tests or its tools understand."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from torch.distributed.run import get_args_parser

from lightning_mimo.commands.cli import main
from lightning_mimo.commands.layout import picture_of
from lightning_mimo.commands.plan_options import parse_options
from lightning_mimo.commands.run import DryRunCLI
from tests.benchmarks.__main__ import BENCHMARKS, MODELS
from tests.gpu.parts import parts as gpu_parts
from tests.support.pages import PAGES, blocks_of, commands_in, commands_of

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())
MARKERS = {marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
RUNS = ("fit", "validate", "test", "predict")
VLM = "configs/digits_vlm.yaml"

COMMANDS = sorted({tuple(command) for page in PAGES for command in commands_of(page)})


class ParsesOnly(DryRunCLI):
    """Reads config and command line, checks every key and type, and stops there."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture(autouse=True)
def command_line(clean_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-mimo"])
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command line adds the current folder
    for name in ("MimoCLI", "DryRunCLI"):
        monkeypatch.setattr(f"lightning_mimo.commands.run.{name}", ParsesOnly)


def is_understood(words: Sequence[str]) -> None:
    """Check a command, as far as that is possible without running it."""
    tool, *rest = words
    tools: dict[str, Callable[[list[str]], None]] = {
        "pip": lambda rest: _expect(rest[:1] == ["install"], words),
        "uv": _uv,
        "lightning-mimo": _lightning_mimo,
        "python": _python,
        "sbatch": _sbatch,
        "torchrun": _torchrun,
    }
    _expect(tool in tools, words)
    tools[tool](rest)


def _expect(is_so: bool, words: object) -> None:
    assert is_so, f"{words} is not understood"


def _uv(words: list[str]) -> None:
    command, *rest = words
    _expect(command in ("run", "sync", "build", "publish"), words)
    while rest and rest[0] in ("--group", "--extra", "--with"):
        if rest[0] == "--with":
            packages = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["hf"]]
            _expect(any(each.startswith(rest[1].partition("=")[0]) for each in packages), words)
            rest = rest[2:]
            continue
        known = "dependency-groups" if rest[0] == "--group" else "optional-dependencies"
        _expect(rest[1] in (PROJECT.get(known) or PROJECT["project"][known]), words)
        rest = rest[2:]
    if command == "run":
        tools = {
            "pytest": _pytest,
            "mkdocs": _mkdocs,
            "ruff": lambda rest: _expect(rest == ["check", "."], words),
            "mypy": lambda rest: _expect(not rest and "mypy" in PROJECT["tool"], words),
        }
        tools.get(rest[0], lambda _: is_understood(rest))(rest[1:])
    else:
        _expect(not rest, words)


def _lightning_mimo(words: list[str]) -> None:
    command, *rest = words
    # A config or a file of the reader's own.
    rest = [VLM if word == "my.yaml" else word for word in rest]
    if command == "new":
        with TemporaryDirectory() as folder:
            main([command, *(f"{folder}/{word}" for word in rest)])
    elif command in ("checkpoint", "export-hf"):
        if command == "export-hf":
            pytest.importorskip("transformers")
        with pytest.raises(SystemExit, match="2"):
            main([command, *rest])  # says that the file is not there, see below
    elif command == "plan":
        parse_options(rest)  # it is run by tests of its own
    elif command == "verify":
        main(["fit", *rest])  # the same keys; it is run by tests of its own
    elif command in RUNS and ("--help" in rest or any(".help=" in word for word in rest)):
        with pytest.raises(SystemExit, match="0"):
            main([command, *rest])
    else:
        _expect(command in (*RUNS, "layout"), words)
        if any("llava" in word and "llava_7b" not in word for word in rest):
            pytest.importorskip("transformers")
        main([command, *rest])


def _python(words: list[str]) -> None:
    assert words[0] == "-m", words
    _expect(importlib.util.find_spec(words[1]) is not None, words)
    if words[1] == "tests.gpu":
        _expect(set(words[2:]) <= {"--out", "results", "--rehearse", *gpu_parts(Path("results"))}, words)
    elif words[1] == "tests.benchmarks":
        _expect(set(words[2:]) <= {*BENCHMARKS, "--help", "--model", *MODELS}, words)
    else:
        usage = {"examples.llava.make_tiny": 1, "examples.llava.answer": 3}
        _expect(words[1].startswith("examples.") and len(words[2:]) == usage.get(words[1], 0), words)


def _pytest(words: list[str]) -> None:
    words = list(words)
    while words:
        word = words.pop(0)
        if word == "-m":
            expression = set(re.findall(r"\w+", words.pop(0))) - {"not", "and", "or"}
            _expect(expression <= MARKERS, expression)
        elif word == "-n":
            _expect(words.pop(0).isdigit(), word)
        elif word == "--dist":  # of pytest-xdist
            _expect(words.pop(0) in ("load", "worksteal"), word)
        else:
            _expect(Path(word).exists(), word)


def _mkdocs(words: list[str]) -> None:
    _expect(words == ["build", "--strict"] and Path("mkdocs.yml").exists(), words)


def _sbatch(words: list[str]) -> None:
    """Options, the script, its config, and the options of lightning-mimo."""
    script = next(i for i, word in enumerate(words) if not word.startswith("--"))
    _expect(Path(words[script]).exists(), words)
    _lightning_mimo(["fit", "--config", *words[script + 1 :]])


def _torchrun(words: list[str]) -> None:
    arguments = get_args_parser().parse_args(words)
    assert arguments.module and arguments.training_script == "lightning_mimo"
    _lightning_mimo(arguments.training_script_args)


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 30
    assert ("uv", "run", "pytest", "-n", "2", "--dist", "worksteal") in COMMANDS
    assert ("uv", "run", "lightning-mimo", "fit", "--config", VLM) in COMMANDS


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_is_understood(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    is_understood(command)
    if "checkpoint" in command or "export-hf" in command:
        assert "there is no such directory" in (error := capsys.readouterr().err) or "not a safetensors file" in error


@pytest.mark.parametrize(
    "command",
    [f"uv run lightning-mimo fit --config {VLM} --trainer.maxsteps=1", "uv run pytst", "uv run pytest -m slrm"],
)
def test_command_with_a_mistake_is_not(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        is_understood(command.split())


@pytest.mark.parametrize("page", [page for page in PAGES if " layout --config" in page.read_text()], ids=str)
def test_layout_is_drawn_as_the_page_shows_it(page: Path) -> None:
    blocks = blocks_of(page)
    for commands, output in pairwise(blocks):
        if not commands.language and commands_in(commands)[-1][:4] == ["uv", "run", "lightning-mimo", "layout"]:
            assert output.text.rstrip("\n") == picture_of(commands_in(commands)[-1][4:])


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_yaml_is_read(page: Path, tmp_path: Path) -> None:
    """Blocks of YAML are configs; what they leave out is that of the digits."""
    for block in blocks_of(page, "yaml"):
        assert "trainer" in yaml.safe_load(block.text)
        config = tmp_path / "config.yaml"
        config.write_text(block.text)
        main(["fit", "--config", VLM, "--config", str(config)])

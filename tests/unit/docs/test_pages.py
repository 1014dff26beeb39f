"""What README and the documentation say is what there is."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import lightning_mimo
import lightning_mimo.models
import lightning_mimo.models.hugging_face
from lightning_mimo import Checks, MimoStrategy, Monitoring, Saving
from lightning_mimo.commands.cli import main
from tests.support.pages import PAGES, blocks_of

README = Path("README.md").read_text()
DOCS = {path.relative_to("docs").as_posix(): path.read_text() for path in Path("docs").rglob("*.md")}
ERRORS, ARCHITECTURE = DOCS["guide/errors.md"], DOCS["about/architecture.md"]
QUOTED = [message for message in re.findall(r"^\| `(.+?)` \|", ERRORS, flags=re.MULTILINE) if message != "message"]
PACKAGE = Path("lightning_mimo")

# What the Trainer sets, and what is the same for every strategy.
OF_THE_TRAINER = ["cluster_environment", "precision_plugin"]
GROUPS = {"checks": Checks, "saving": Saving, "monitoring": Monitoring}


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


MESSAGES = [message for path in PACKAGE.rglob("*.py") for message in messages_of(path)]


def first_column(text: str) -> list[str]:
    """What stands as code in the first column of the tables of a page."""
    cells = re.findall(r"^\| ([^|]*`[^|]*) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(.+?)`", cell)]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160
    assert README.index("pip install uv && uv run lightning-mimo fit") < README.index("uv run pytest") < 1000


def test_own_model_is_the_file_and_has_forty_lines() -> None:
    (block, *_) = blocks_of(Path("README.md"), "python")
    file = Path("examples/torch_encoder.py").read_text()
    assert block.text == file[file.index("import lightning") :]
    assert len(block.text.splitlines()) <= 40


def test_there_are_messages() -> None:
    assert len(QUOTED) >= 28


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_message_is_one_of_the_packages(message: str) -> None:
    pattern = ".*".join(re.escape(words) for words in message.split("…"))
    assert any(re.search(pattern, known) for known in MESSAGES)


def test_tree_of_errors_is_that_of_the_package() -> None:
    tree = next(block.text for block in blocks_of(Path("docs/guide/errors.md"), "text"))
    source = (PACKAGE / "errors.py").read_text()
    assert all(line.strip() in source for line in tree.splitlines())


@pytest.mark.parametrize("kind", ["examples/[!_]*.py", "configs/*.yaml"])
def test_every_example_and_config_is_named(kind: str) -> None:
    names = [path.name if "examples" in kind else str(path) for path in Path().glob(kind)]
    assert names
    assert [name for name in names if f"`{name}`" not in DOCS["getting-started.md"]] == []


@pytest.mark.parametrize(
    "module",
    [lightning_mimo, lightning_mimo.models, lightning_mimo.models.hugging_face],
    ids=lambda module: module.__name__,
)
def test_reference_has_the_public_names_and_no_other(module: ModuleType) -> None:
    entries = [entry for text in DOCS.values() for entry in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)]
    described = [entry for entry in entries if entry.rpartition(".")[0] == module.__name__]
    assert sorted(described) == sorted(f"{module.__name__}.{name}" for name in module.__all__)


def test_options_of_the_strategy_are_described() -> None:
    arguments = [name for name in inspect.signature(MimoStrategy).parameters if name not in OF_THE_TRAINER]
    grouped = [f"{name}.{field.name}" for name, group in GROUPS.items() for field in dataclasses.fields(group)]
    arguments = [*(name for name in arguments if name not in GROUPS), *grouped]
    assert sorted(first_column(DOCS["reference/strategy.md"])) == sorted(arguments)
    assert all(f"`{name}`" in DOCS["reference/strategy.md"] for name in OF_THE_TRAINER)


def test_every_command_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    usage = capsys.readouterr().out
    groups = re.findall(r"lightning-mimo (\{[\w,]+\}|[\w-]+)", usage)
    commands = {name for group in groups for name in re.findall(r"[\w-]+", group)}
    assert commands >= {"fit", "layout", "checkpoint"}
    assert commands <= set(first_column(DOCS["reference/command-line.md"]))


def test_figures_of_telemetry_are_those_that_are_logged() -> None:
    section = DOCS["guide/observe.md"].partition("## Telemetry")[2].partition("\n## ")[0]
    figures = first_column(section)
    assert len(figures) == 9
    assert [figure for figure in figures if figure not in messages_of(PACKAGE / "observe" / "telemetry.py")] == []


# ---- architecture


def section_of(heading: str, *, before: str) -> str:
    return ARCHITECTURE[ARCHITECTURE.index(f"# {heading}\n") : ARCHITECTURE.index(f"# {before}\n")]


def folder_map() -> Iterator[str]:
    """Names of folders and files of the package, as the architecture page lists them."""
    yield from (name.rstrip("/").removesuffix(".py") for name in first_column(section_of("Folders", before="Tests")))


def test_folder_map_is_complete() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert sorted(folder_map()) == sorted(folders | files)


def test_folder_map_is_in_the_order_of_imports() -> None:
    contracts = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    layer_of = {name.strip(): i for i, layer in enumerate(layers) for name in layer.split(":")}
    order = [layer_of[name] for name in folder_map()]
    assert order == sorted(order)


def test_tests_are_where_the_map_says() -> None:
    folders = [name.rstrip("/") for name in first_column(section_of("Tests", before="Read first")) if name != "tests"]
    assert sorted(folders) == sorted(path.parent.name for path in Path("tests").glob("*/__init__.py"))


def test_files_to_read_first_exist() -> None:
    files = re.findall(r"`([\w/]+\.py)`", section_of("Read first", before="One training step"))
    assert len(files) > 5
    assert [file for file in files if not (PACKAGE / file).exists()] == []


# ---- links and version


@pytest.mark.parametrize("page", [page for page in PAGES if "docs" not in page.parts], ids=str)
def test_links_of_pages_outside_of_the_site_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert Path(target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_are_named_exist(page: Path) -> None:
    named = r"`((?:examples|configs|tests|docs|lightning_mimo)/[\w./]+\.(?:py|pyi|yaml|md|sbatch))`"
    paths = [path for path in re.findall(named, page.read_text()) if "NAME" not in path]
    assert [path for path in paths if not Path(path).exists()] == []


def test_changelog_has_the_version() -> None:
    headings = re.findall(r"^## (\S+)", Path("CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert lightning_mimo.__version__ in headings

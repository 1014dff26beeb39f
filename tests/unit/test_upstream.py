"""Every private name of Lightning, torch and megatron-core is listed with a reason, used, and still there."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lightning_mimo
import lightning_mimo.upstream.datasets
import lightning_mimo.upstream.lightning
import lightning_mimo.upstream.megatron
import lightning_mimo.upstream.torch
import lightning_mimo.upstream.transformers
from lightning_mimo.upstream import Attribute

PACKAGE = Path(lightning_mimo.__file__).parent
LIBRARIES = ("lightning", "torch", "megatron")
IMPORTED = {**lightning_mimo.upstream.lightning.IMPORTED, **lightning_mimo.upstream.torch.IMPORTED}
ATTRIBUTES = (
    *lightning_mimo.upstream.lightning.ATTRIBUTES,
    *lightning_mimo.upstream.torch.ATTRIBUTES,
    *lightning_mimo.upstream.megatron.ATTRIBUTES,
    *lightning_mimo.upstream.transformers.ATTRIBUTES,
    *lightning_mimo.upstream.datasets.ATTRIBUTES,
)
LISTED = {each.name for each in ATTRIBUTES}
# Python's own: public, for all their underscores. The last has been there since Python 2.
DOCUMENTED = {"os._exit", "sys._current_frames", "sys._getframe", "atexit._run_exitfuncs"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_upstream(module: str) -> bool:
    return module.split(".")[0] in LIBRARIES


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def nodes(*, in_upstream: bool = False) -> Iterator[tuple[str, ast.AST]]:
    """File and node of everything in the package; cpu.py has a table and a test of its own."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "cpu.py" and (path.parent.name == "upstream") == in_upstream:
            file = str(path.relative_to(PACKAGE))
            for node in ast.walk(tree_of(path)):
                yield file, node


def private_imports(*, in_upstream: bool) -> dict[str, str]:
    """Name -> file: of those with an underscore in their name or in that of their module."""
    found = {}
    for file, node in nodes(in_upstream=in_upstream):
        if isinstance(node, ast.ImportFrom) and node.module and is_upstream(node.module):
            hidden = any(map(is_private, node.module.split(".")))
            found |= {each.name: file for each in node.names if hidden or is_private(each.name)}
    return found


def test_private_imports_are_made_in_upstream_alone_and_have_a_reason() -> None:
    assert private_imports(in_upstream=True).keys() == IMPORTED.keys()
    elsewhere = {name: file for name, file in private_imports(in_upstream=False).items() if name not in LISTED}
    assert elsewhere == {}
    reasons = [*IMPORTED.values(), *(each.reason for each in ATTRIBUTES)]
    assert all(reasons)


def test_private_attributes_are_listed() -> None:
    """Those of other objects than ``self``, whose names this package does not bind itself."""
    bound: set[str] = set()
    used: dict[str, str] = {}
    for file, node in nodes():
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                bound.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                bound.add(name)
            case ast.Attribute(attr=name) if is_private(name) and ast.unparse(node) not in DOCUMENTED:
                used[name] = file
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]) if is_private(name):
                used[name] = file
    assert {name: file for name, file in used.items() if name not in bound | LISTED} == {}


def classes_with_upstream_bases() -> Iterator[type]:
    for found in pkgutil.walk_packages(lightning_mimo.__path__, "lightning_mimo."):
        if found.name.split(".")[1] not in ("__main__", "cpu"):
            for kind in vars(importlib.import_module(found.name)).values():
                if inspect.isclass(kind) and kind.__module__ == found.name and any(map(_is_of_upstream, kind.__mro__)):
                    yield kind


def _is_of_upstream(kind: type) -> bool:
    return is_upstream(kind.__module__)


def test_what_subclasses_share_with_their_bases_is_listed() -> None:
    """A private name that a class uses and its base has, too: overridden, or used, or the same by accident."""
    unlisted = []
    for kind in classes_with_upstream_bases():
        names = set()
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind)))):
            match node:
                case ast.FunctionDef(name=name) | ast.Attribute(attr=name) if is_private(name):
                    names.add(name)
        for base in filter(_is_of_upstream, kind.__mro__):
            shared = {name for name in names if name in vars(base) or sets(base, name)}
            unlisted += [f"{kind.__name__}: {base.__name__}.{name}" for name in shared - LISTED]
    assert unlisted == []


def test_every_name_in_the_list_is_used() -> None:
    imported = {
        each.name
        for _, node in nodes()
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_mimo.upstream.")
        for each in node.names
    }
    assert imported == IMPORTED.keys()
    text = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.parent.name != "upstream")
    assert [each.name for each in ATTRIBUTES if not re.search(rf"\b{each.name}\b", text)] == []


@pytest.mark.parametrize("attribute", ATTRIBUTES, ids=lambda each: f"{each.owner.rpartition('.')[2]}.{each.name}")
def test_attribute_is_there(attribute: Attribute) -> None:
    if (package := attribute.owner.split(".")[0]) in ("transformers", "datasets"):
        pytest.importorskip(package, reason="need not be installed")
    owner = resolved(attribute.owner)
    bases = owner.__mro__ if inspect.isclass(owner) else ()
    assert hasattr(owner, attribute.name) or any(sets(base, attribute.name) for base in bases)


def resolved(path: str) -> Any:
    """A module, or a class in one."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def sets(kind: type | ModuleType, name: str) -> bool:
    """Whether a class sets an attribute of its instances."""
    return kind is not object and bool(re.search(rf"\bself\.{name}\b[^=\n]*=", _source(kind)))


@cache
def _source(kind: type | ModuleType) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # not written in Python
        return ""

"""Condenses jsonargparse's nested error reports about a config into one readable line."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn, get_type_hints, override

from lightning.pytorch.cli import LightningArgumentParser

from lightning_mimo.strategy.options import MOVED, key_now
from lightning_mimo.strategy.strategy import MimoStrategy

_UNKNOWN = re.compile(
    r"(?:(?:Option|Group '(?P<group>[^']+)'|Subcommand '[^']+') )?(?:does not accept option )?"
    r"'?(?P<key>[^' ]+)'?(?: is not accepted)?$"
)
_EXPECTED = re.compile(r"Expected an? (?P<what>.+?)(?:\. Got value: (?P<given>.+))?$", re.DOTALL)
_CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)':")
_KEY = re.compile(r'Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)$', re.DOTALL)
_UNRECOGNIZED = re.compile(r"unrecognized arguments: --(?P<group>[^=\s]+)\.(?P<key>[^=.\s]+)")
_NO_CLASS = re.compile(r"Expected a dot import path string: (.*)$")
_NESTED = re.compile(r"Given value: NestedArg\(key='(?P<key>[^']+)', val=(?P<value>.*)\)$")
_NAMES = {"NoneType": "null", "str": "a word", "int": "a whole number", "float": "a number", "bool": "true or false"}


class OneLineParser(LightningArgumentParser):
    """Parser that reports errors in arguments and configs as one line on stderr and exits with code 2."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser for the arguments of one class; the main parser reports its errors
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        keys = [action.dest for action in parser._actions if "." in action.dest or action.option_strings]
        self.exit(2, f"lightning-mimo: error: {condense(message, keys)}\n")


@dataclass
class _Line:
    """A line of a report and the lines that are indented below it."""

    text: str
    below: list[_Line] = field(default_factory=list)


def condense(message: str, keys: Iterable[str] = ()) -> str:
    """Condense a report of jsonargparse into one line: the key, the error, and the accepted values.

    Args:
        message: the report.
        keys: all keys of the parser, to suggest a similar one for an unknown key.
    """
    if words := re.match(r"unrecognized arguments: (.*)", message):
        return _unrecognized(words[1].split(), keys)
    if missing := re.match(r"the following arguments are required: (.*)", message):
        required = missing[1].replace("fit.", "").replace("validate.", "").replace("test.", "").replace("predict.", "")
        return f"{required} must be given; use --config FILE with these keys, such as configs/digits_vlm.yaml."
    if unknown := re.match(r"Subcommand '[^']+' does not accept option '([^']+)'", message):
        return _no_key(unknown[1], "the config", keys)
    if not re.match(r"\s*(Parser key|Does not validate|Problem with given class_path)", message):
        return " ".join(message.split())
    return _explain(_tree(message), where="", given=_given(message))


def _unrecognized(words: list[str], keys: Iterable[str]) -> str:
    word = words[0]
    if word.startswith("--"):
        return _no_key(word[2:].partition("=")[0], "the config", keys)
    return f"{word!r} is not understood; write --config FILE or --dotted.key=value."


def _no_key(key: str, where: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    text = f"{where} has no key {key!r}."
    if close:
        return f"{text} Did you mean {close[0]!r}?"
    if 0 < len(known) <= 30:
        return f"{text} It has {', '.join(known)}."
    return f"{text} 'lightning-mimo fit --help' lists all keys."


def _tree(message: str) -> _Line:
    root = _Line("")
    stack = [(-1, root)]
    for raw in message.splitlines():
        if not raw.strip():
            continue
        # Lines that belong to a bullet are indented as far as its text.
        text = raw.strip()
        indent = len(raw) - len(raw.lstrip())
        if text.startswith("- "):
            text, indent = text[2:], indent + 1
        while stack[-1][0] >= indent:
            stack.pop()
        line = _Line(text)
        stack[-1][1].below.append(line)
        stack.append((indent, line))
    return root


def _given(message: str) -> tuple[str, str] | None:
    """Key and value of a dotted argument, relative to its class."""
    found = _NESTED.search(message.rstrip())
    return (found["key"], found["value"]) if found else None


def _explain(line: _Line, *, where: str, given: tuple[str, str] | None, owner: str | None = None) -> str:
    if key := _KEY.match(line.text):
        where = f"{where}.{key['key']}" if where else key["key"]
        if key["rest"]:
            return f"{where}: {' '.join(key['rest'].split())}"
    elif path := _CLASS.match(line.text):
        owner = path["path"]
        if where and not dataclasses.is_dataclass(_imported(owner)):
            where += ".init_args"
    choices = [below for below in line.below if not below.text.startswith(("Subtypes:", "Given value"))]
    for below in choices:
        if below.text == "Errors:":
            return _best_of(below.below, where=where, given=given, owner=owner, value=_value_of(line))
    if choices:
        return _explain(choices[0], where=where, given=given, owner=owner)
    return _leaf(line.text, where, given, owner)


def _best_of(
    choices: list[_Line], *, where: str, given: tuple[str, str] | None, owner: str | None, value: str | None
) -> str:
    """Explain why a value matches no type of a union, for the type that the user most likely meant."""
    for choice in choices:
        if _CLASS.match(choice.text) or choice.below:
            return _explain(choice, where=where, given=given, owner=owner)
    for choice in choices:
        if (key := _KEY.match(choice.text)) and not key["rest"]:
            return f"{_place(where, given)} must have keys and values, but is {value}."
        if not _EXPECTED.match(choice.text):  # the message of a constructor of a class that was given
            return f"{_place(where, given)}: {choice.text}".removeprefix(": ")
    expected = [found["what"] for choice in choices if (found := _EXPECTED.match(choice.text))]
    if expected:
        return f"{_place(where, given)} must be {_any_of(expected)}, but is {value!r}."
    return f"{_place(where, given)}: {'; '.join(choice.text for choice in choices)}"


def _value_of(line: _Line) -> str | None:
    values = [below.text.removeprefix("Given value: ") for below in line.below if below.text.startswith("Given value:")]
    return values[0] if values else None


def _leaf(text: str, where: str, given: tuple[str, str] | None, owner: str | None) -> str:
    place = _place(where, given)
    if (key := _KEY.match(text)) and not key["rest"]:
        return f"{place} must have keys and values" + (f", but is {given[1]}." if given else ".")
    if found := _UNRECOGNIZED.match(text):
        return _no_key(found["key"], f"{where}.{found['group']}", _keys_of(owner, found["group"]))
    if found := _NO_CLASS.match(text):
        return f"{place} must have keys and values, but is {found[1]}."
    if found := _EXPECTED.match(text):
        if found["given"] is None:
            return f"{place}: {text}."
        return f"{place} must be {_any_of([found['what']])}, but is {found['given']!r}."
    if "accept" in text and (found := _UNKNOWN.match(text)):
        known = _keys_of(owner, found["group"])
        inside = f"{where}.{found['group']}" if found["group"] else place.rpartition(".")[0] if given else where
        if found["key"] in MOVED and _is_strategy(owner):
            return f"{inside}.{found['key']} has moved: write {inside}.{key_now(found['key'])}."
        return _no_key(found["key"], inside if found["group"] else f"{inside} ({owner})", known)
    if owner and re.search(r"has no attribute|^No \w+(\.\w+)* attribute|^No module named", text):
        return f"{where.removesuffix('.init_args')}.class_path: {owner!r} cannot be imported: {text}."
    return f"{place}: {text}"


def _place(where: str, given: tuple[str, str] | None) -> str:
    if given is None or ".init_args" not in where:
        return where
    return f"{where.partition('.init_args')[0]}.init_args.{given[0]}"


def _any_of(types: Iterable[str]) -> str:
    names = []
    for kind in types:
        if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
            names.append(f"one of {literal[1]}")
        else:
            plain = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind)
            names.append(_NAMES.get(plain, plain))
    return " or ".join(names)


def _is_strategy(owner: str | None) -> bool:
    kind = _imported(owner) if owner else None
    return isinstance(kind, type) and issubclass(kind, MimoStrategy)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _keys_of(owner: str | None, group: str | None) -> list[str]:
    """Argument names of a class, or of the dataclass that is the type of its argument ``group``."""
    kind = _imported(owner) if owner else None
    if kind is not None and group:
        kind = get_type_hints(kind.__init__).get(group)
    return [name for name in inspect.signature(kind).parameters if name != "self"] if kind is not None else []

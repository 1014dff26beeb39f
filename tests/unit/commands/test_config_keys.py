"""Every key of a config has its line in ``--help``."""

from __future__ import annotations

import sys

import pytest
from jsonargparse import ArgumentParser

from examples.digits.data import DigitsData
from examples.digits.model import DigitsModule
from examples.digits.report import DigitsReport
from examples.digits_avlm.data import TonesData
from examples.digits_avlm.model import DigitsAvlmModule
from examples.llava.data import ConversationData
from examples.llava.model import LlavaModule
from lightning_mimo import Checks, MimoStrategy, ModuleParallelism, Monitoring, OptimizerOverride, Saving
from lightning_mimo.commands.cli import main
from lightning_mimo.commands.config_errors import condense
from lightning_mimo.models.sizes import Recompute, TransformerSize

CLASSES = [
    MimoStrategy,
    Checks,
    Saving,
    Monitoring,
    ModuleParallelism,
    OptimizerOverride,
    TransformerSize,
    Recompute,
    DigitsModule,
    DigitsAvlmModule,
    LlavaModule,
    DigitsData,
    TonesData,
    ConversationData,
    DigitsReport,
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_key_is_documented(kind: type) -> None:
    parser = ArgumentParser()
    keys = parser.add_class_arguments(kind)
    silent = [action.dest for action in parser._actions if action.dest in keys and not action.help]
    assert keys
    assert silent == []


@pytest.mark.parametrize(
    ("report", "line"),
    [
        ("something else\n  happened", "something else happened"),
        (
            "Parser key \"a.b\":\n  Expected a <class 'int'>. Got value: two",
            "a.b must be a whole number, but is 'two'.",
        ),
        ('Parser key "a":\n  Expected a dot import path string: 3', "a must have keys and values, but is 3."),
    ],
    ids=["unknown_report", "type", "no_keys"],
)
def test_reports_are_condensed(report: str, line: str) -> None:
    assert condense(report) == line


def test_command_may_stand_behind_its_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    config = ["--config", "configs/digits_vlm.yaml"]
    shown = []
    for arguments in (["layout", *config], [*config, "layout"]):
        monkeypatch.setattr(sys, "argv", ["lightning-mimo", *arguments])
        main()
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "4 ranks" in shown[0]
    monkeypatch.setattr(sys, "argv", ["lightning-mimo", "--config", "missing.yaml", "fit"])
    with pytest.raises(SystemExit):
        main()
    assert "missing.yaml" in capsys.readouterr().err

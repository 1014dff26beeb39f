"""No damaged config ends in a traceback, in silence or not at all."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import pytest

from lightning_mimo.commands.cli import main
from tests.fuzz.configs import BASE, Damaged, damaged_configs, write
from tests.fuzz.tally import HEAD, Outcome, Tally, TooLong, limited

_SECONDS = 120


def dry_run(path: Path) -> tuple[Outcome, str]:
    """Run ``fit --dry-run=weights`` in this process: what came of it, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with limited(_SECONDS):
                main(["fit", "--dry-run=weights", "--config", str(path)])
    except SystemExit as stop:
        text = err.getvalue()
        is_clear = stop.code == 2 and text.startswith("lightning-mimo: error: ") and text.count("\n") == 1
        return ("refused" if is_clear else "raw"), text
    except TooLong:
        return "hung", ""
    except BaseException as error:
        return "raw", f"{type(error).__name__}: {error}"
    return "accepted", out.getvalue()


def try_all(configs: list[Damaged], folder: Path) -> Tally:
    tally = Tally(kind="configs")
    for config in configs:
        outcome, text = dry_run(write(folder, config))
        tally.add(outcome, config.what, text)
    return tally


@pytest.fixture(autouse=True)
def command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-mimo"])


def test_config_as_it_is_runs(tmp_path: Path) -> None:
    outcome, text = dry_run(write(tmp_path, Damaged(what="nothing", text=BASE)))
    assert outcome == "accepted", text


def test_damaged_config_is_refused_in_one_line(tmp_path: Path) -> None:
    tally = try_all(list(damaged_configs(2, 15)), tmp_path)
    assert not tally.bad, "\n".join(tally.bad)
    assert tally.outcomes["refused"] > 5


@pytest.mark.exhaustive
def test_damaged_configs_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tally = try_all(list(damaged_configs(1, 800)), tmp_path)
    with capsys.disabled():
        print(f"\n{HEAD}\n{tally}")
    assert not tally.bad, "\n".join(tally.bad)

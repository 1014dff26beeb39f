"""On GPUs, where ranks are started as scripts, none is started before the layout has been checked."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment

from lightning_mimo.errors import LayoutError
from lightning_mimo.launch.script_launcher import ScriptLauncher


def refuse(trainer: Any) -> NoReturn:
    raise LayoutError("3 ranks do not divide")


def test_no_process_is_started_for_a_layout_that_is_refused() -> None:
    launcher = ScriptLauncher(LightningEnvironment(), num_processes=8, num_nodes=1, validate=refuse)
    called = []
    with pytest.raises(LayoutError, match="3 ranks do not divide"):
        launcher.launch(called.append, 1, trainer=None)
    assert launcher.procs == called == []

"""An exit handler knows the code that its process ends with."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys
from lightning_mimo.launch.exit_code import ExitCode
found = ExitCode()
found.watch(True)
atexit.register(lambda: print(found.code, flush=True))
def leave():
    {leave}
leave()
"""


@pytest.mark.parametrize(
    "leave",
    [
        "pass",
        "sys.exit()",
        "sys.exit(3)",
        "raise SystemExit(3)",
        "sys.exit(256 + 7)",
        "sys.exit('a line')",
        "sys.exit(False)",
        "int('two')",
        "raise KeyboardInterrupt",
        "exec('try: sys.exit(3)\\nexcept SystemExit: pass')",
    ],
)
@pytest.mark.parametrize("how", ["-c", "-m"])
def test_exit_handler_knows_the_exit_code(leave: str, how: str, tmp_path, monkeypatch) -> None:
    script = SCRIPT.format(leave=leave)
    (tmp_path / "script.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [sys.executable, how, script if how == "-c" else "script"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # Python itself ends by SIGINT after a KeyboardInterrupt; a rank, from its exit handler, with 1.
    code = 1 if leave == "raise KeyboardInterrupt" else done.returncode
    assert done.stdout == f"{code}\n", done.stderr

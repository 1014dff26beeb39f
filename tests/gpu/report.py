"""The table of what was found out."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import torch


def describe_machine() -> dict[str, str]:
    """The GPU and the versions that the numbers belong to."""
    has_gpu = torch.cuda.is_available()
    return {
        "GPU": torch.cuda.get_device_name() if has_gpu else "none",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if has_gpu else "none",
        **{name: importlib.metadata.version(name) for name in ("megatron-core", "lightning")},
    }


def to_markdown(machine: Mapping[str, str], command: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of two columns for each part."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()) + f", `{command}`", ""]
    for part, figures in found.items():
        lines += [f"## {part}", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {_cell(value)} |" for key, value in figures.items()]
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "<br>".join(_cell(each) for each in value) or "none"
    return str(value).replace("\n", "<br>").replace("|", "\\|")

"""The lines of a config that a plan changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_mimo.layout.module_parallelism import ResolvedParallelism
from lightning_mimo.planning.candidate import Candidate
from lightning_mimo.planning.hardware import Hardware

_RECOMPUTE = {"granularity": "full", "method": "uniform", "num_layers": 1}


def changes_of(
    candidate: Candidate,
    hardware: Hardware,
    *,
    ddp: Any,
    recompute: Mapping[str, Sequence[str]],
    sequence_parallel: Sequence[str],
    cleared: Sequence[str] = (),
) -> dict[str, Any]:
    """The keys of a config that a plan sets, nested as in the file.

    Args:
        candidate: the plan.
        hardware: gives the number of devices per node.
        ddp: the config's DDP options, which are kept but for the distributed optimizer.
        recompute: module -> keys of the model for its recomputation, such as ``model.init_args.vision.recompute``.
        sequence_parallel: keys of the model for sequence parallelism.
        cleared: keys of the model that are for another layout.
    """
    nodes, devices = _nodes(candidate.layout.world_size, hardware.devices_per_node)
    strategy: dict[str, Any] = {
        "modules": {name: _sizes(each) for name, each in candidate.layout.modules.items()},
        "colocate": candidate.layout.colocated,
        "num_microbatches": candidate.num_microbatches,
        "encoder_run_ahead": candidate.encoder_run_ahead,
        "ddp": {
            **(ddp if isinstance(ddp, dict) else {}),
            "use_distributed_optimizer": candidate.distributed_optimizer,
            "overlap_grad_reduce": candidate.overlap,
            "overlap_param_gather": False,
        },
    }
    changes: dict[str, Any] = {
        "trainer": {"devices": devices, "num_nodes": nodes, "strategy": {"init_args": strategy}},
    }
    for name, keys in recompute.items():
        for key in keys:
            _set(changes, key, dict(_RECOMPUTE) if name in candidate.variant.recompute else None)
    for key in sequence_parallel:
        _set(changes, key, candidate.variant.sequence_parallel)
    for key in cleared:
        _set(changes, key, None)
    return changes


def as_yaml(changes: Mapping[str, Any]) -> str:
    """The lines, ready to paste."""
    return yaml.safe_dump(dict(changes), sort_keys=False, width=110, default_flow_style=None).rstrip()


def write_config(path: Path, config: Mapping[str, Any], changes: Mapping[str, Any], *, head: str) -> None:
    """Write a config with the changes of a plan.

    Args:
        path: the file.
        config: all keys of the user's config.
        changes: what the plan changes.
        head: a comment, one line or several.
    """
    merged = _merged(config, changes)
    comment = "\n".join(f"# {line}" for line in head.splitlines())
    path.write_text(f"{comment}\n{yaml.safe_dump(merged, sort_keys=False, width=110)}")


def _merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in changes.items():
        before = merged.get(key)
        # The layout is replaced as a whole: a module's old dp does not fit its new tp.
        if isinstance(before, dict) and isinstance(value, dict) and key not in ("modules", "ddp"):
            merged[key] = _merged(before, value)
        else:
            merged[key] = value
    return merged


def _sizes(sizes: ResolvedParallelism) -> dict[str, int]:
    axes = {"tp": sizes.tp, "pp": sizes.pp, "dp": sizes.dp, "ep": sizes.ep, "expt_tp": sizes.expt_tp}
    return {axis: size for axis, size in axes.items() if size > 1 or axis in ("tp", "dp")}


def _nodes(world_size: int, devices_per_node: int) -> tuple[int, int]:
    """Nodes and devices of each; a number that does not fill nodes needs a launcher that starts fewer on some."""
    if world_size <= devices_per_node:
        return 1, world_size
    devices = max(n for n in range(1, devices_per_node + 1) if world_size % n == 0)
    return world_size // devices, devices


def _set(into: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        into = into.setdefault(part, {})
    into[last] = value

"""Scales a run down to the ranks of one machine: parallel sizes of at most 2, few layers, small widths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import ModuleParallelism

AXES = ("tp", "pp", "dp", "ep", "expt_tp")
_HEAD_DIM = 8


@dataclass(frozen=True, kw_only=True)
class ScaledLayout:
    """A layout that fits the ranks at hand.

    Attributes:
        modules: sizes; every dp is given.
        colocate: whether all modules run on all ranks.
        num_microbatches: pipeline microbatches.
        global_batch_size: samples of a step.
        left_out: axes that are divided in the user's layout and not in this one, such as ``dp of images``.
    """

    modules: Mapping[str, ModuleParallelism]
    colocate: bool
    num_microbatches: int
    global_batch_size: int
    left_out: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        sizes = [sizes.size for sizes in self.modules.values()]
        return max(sizes) if self.colocate else sum(sizes)

    @property
    def divided(self) -> list[tuple[str, str]]:
        """Module and axis of every size above 1."""
        return [
            (name, axis) for name, sizes in self.modules.items() for axis in AXES if (getattr(sizes, axis) or 1) > 1
        ]


def scale_layout(layout: MimoLayout, *, ranks: int, num_microbatches: int) -> ScaledLayout:
    """Scale a layout down: every axis that is divided stays divided, by 2, as far as there are ranks.

    Args:
        layout: of the user's run.
        ranks: at most this many.
        num_microbatches: of the user's run; at most 3 are kept, or twice the pipeline stages.

    Raises:
        ConfigError: if not even one rank for each module fits.
    """
    wanted = {name: _halved(sizes) for name, sizes in layout.modules.items()}
    stages = max(sizes.pp for sizes in wanted.values())
    microbatches = min(num_microbatches, max(3, 2 * stages))
    left_out: list[str] = []
    while True:
        modules = _on_all_ranks(wanted) if layout.colocated else wanted
        scaled = ScaledLayout(
            modules=modules,
            colocate=layout.colocated,
            num_microbatches=microbatches,
            # Two samples for each replica and microbatch, in whatever way the modules are divided.
            global_batch_size=2 * microbatches * lcm(2, *(sizes.dp or 1 for sizes in modules.values())),
            left_out=tuple(left_out),
        )
        if scaled.ranks <= ranks:
            return scaled
        module = max(wanted, key=lambda name: wanted[name].size)
        axis = next((axis for axis in ("dp", "pp", "tp") if getattr(wanted[module], axis) > 1), None)
        if axis is None:
            raise ConfigError(f"--ranks={ranks}: the layout has {len(wanted)} modules on ranks of their own.")
        wanted[module] = _without(wanted[module], axis)
        left_out.append(f"{axis} of {module}")


def one_process(scaled: ScaledLayout) -> ScaledLayout:
    """All modules in one process, the reference."""
    return replace(scaled, modules={name: ModuleParallelism(dp=1) for name in scaled.modules}, colocate=True)


def divided_only(scaled: ScaledLayout, module: str, axis: str) -> ScaledLayout:
    """The layout with one axis of one module divided and all else whole."""
    alone = {name: ModuleParallelism(dp=1) for name in scaled.modules}
    alone[module] = {
        "tp": ModuleParallelism(tp=2, dp=1),
        "pp": ModuleParallelism(pp=2, dp=1),
        "dp": ModuleParallelism(dp=2),
        "ep": ModuleParallelism(dp=2, ep=2),
        "expt_tp": ModuleParallelism(dp=2, expt_tp=2),
    }[axis]
    return replace(scaled, modules=_on_all_ranks(alone) if scaled.colocate else alone)


def _halved(sizes: ModuleParallelism) -> ModuleParallelism:
    """Every size of at least 2 becomes 2, and there are as many replicas as experts need."""
    tp, pp, ep, expt_tp = (min(2, size) for size in (sizes.tp, sizes.pp, sizes.ep, sizes.expt_tp))
    return ModuleParallelism(tp=tp, pp=pp, dp=max(min(2, sizes.dp or 1), ep * expt_tp // tp), ep=ep, expt_tp=expt_tp)


def _without(sizes: ModuleParallelism, axis: str) -> ModuleParallelism:
    """Also without expert parallelism, which needs the ranks."""
    whole = replace(sizes, ep=1, expt_tp=1)
    return replace(whole, tp=1) if axis == "tp" else replace(whole, pp=1) if axis == "pp" else replace(whole, dp=1)


def _on_all_ranks(modules: Mapping[str, ModuleParallelism]) -> dict[str, ModuleParallelism]:
    """Raise every dp to what colocated modules need: all have the same number of ranks."""
    ranks = lcm(*(sizes.size for sizes in modules.values()))
    return {name: replace(sizes, dp=(sizes.dp or 1) * ranks // sizes.size) for name, sizes in modules.items()}


def shrink_sizes(arguments: Any, scaled: ScaledLayout, *, layers: int) -> list[str]:
    """Shrink every TransformerSize among the arguments of a model, in place.

    Args:
        arguments: ``init_args`` of the model, as a config has them.
        scaled: tp, pp and ep that must divide the new sizes.
        layers: of every transformer, rounded up to what pp divides.

    Returns:
        A line for each, saying what it was and what it is now.
    """
    tp, pp, ep = (max(getattr(sizes, axis) for sizes in scaled.modules.values()) for axis in ("tp", "pp", "ep"))
    lines = []
    for path, size in _sizes_in(arguments, ""):
        before = {key: size.get(key) for key in ("num_layers", "hidden_size", "num_attention_heads")}
        grouped = bool(size.get("num_query_groups")) and size["num_query_groups"] < size["num_attention_heads"]
        heads = 2 * tp
        head_dim = size.get("head_dim") if size.get("mrope_section") else None
        size["num_layers"] = -(-layers // pp) * pp
        size["num_attention_heads"] = heads
        size["num_query_groups"] = tp if grouped else None
        size["hidden_size"] = heads * (head_dim or _HEAD_DIM)
        size["ffn_hidden_size"] = None if size.get("ffn_hidden_size") is None else 2 * size["hidden_size"]
        size["head_dim"] = head_dim
        size["dropout"] = 0.0
        size["first_stage_layers"] = size["last_stage_layers"] = None
        if size.get("num_experts"):
            size["num_experts"] = max(2 * ep, size.get("experts_per_token") or 2)
        after = {key: size[key] for key in before}
        lines.append(f"{path}: " + ", ".join(f"{key} {before[key]} -> {after[key]}" for key in before))
    return lines


def _sizes_in(value: Any, path: str) -> Iterator[tuple[str, MutableMapping[str, Any]]]:
    """Path and entries of everything that has the fields of a TransformerSize."""
    entries = vars(value) if hasattr(value, "__dict__") and not isinstance(value, type) else value
    if not isinstance(entries, MutableMapping):
        return
    if {"num_layers", "hidden_size", "num_attention_heads"} <= entries.keys():
        yield path, entries
        return
    for key, each in entries.items():
        yield from _sizes_in(each, f"{path}.{key}" if path else str(key))

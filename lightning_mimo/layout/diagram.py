"""Draws a layout as text: one column per rank, one row per module. Pure Python."""

from __future__ import annotations

from lightning_mimo.layout.batch_plan import micro_batch_sizes
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import DENSE_AXES, LANGUAGE, ResolvedParallelism, span_of

_WIDEST = 24  # most ranks that are drawn side by side


def draw_layout(layout: MimoLayout, *, global_batch_size: int, num_microbatches: int) -> str:
    """Draw the diagram that ``lightning-mimo layout`` prints.

    Raises:
        LayoutError: if the global batch does not divide over a module.
    """
    micro = micro_batch_sizes(layout, global_batch_size=global_batch_size, num_microbatches=num_microbatches)
    kind = "colocated: all modules on all ranks" if layout.colocated else "each module on ranks of its own"
    drawn = _grid(layout) if layout.world_size <= _WIDEST else _spans(layout)
    lines = [f"{layout.world_size} ranks, {kind}", "", *drawn, ""]
    for name, sizes in layout.modules.items():
        lines.append(
            f"{name}: {_sizes(sizes)}; {micro[name]} sample{'s' if micro[name] > 1 else ''} per microbatch and rank "
            f"= {global_batch_size} / ({num_microbatches} microbatches * dp {sizes.dp})"
        )
    if layout.encoders:
        lines.append("")
    lines.extend(_bridge(name, layout) for name in layout.encoders)
    return "\n".join(lines)


def _grid(layout: MimoLayout) -> list[str]:
    """One row per module and axis larger than 1, one column per rank."""
    rows: list[tuple[str, list[str]]] = [("rank", [str(rank) for rank in range(layout.world_size)])]
    for name, sizes in layout.modules.items():
        shown = [axis for axis, size in zip(DENSE_AXES, sizes.shape, strict=True) if size > 1] or ["tp"]
        for i, axis in enumerate(shown):
            cells = [
                f"{axis}{sizes.coordinates(rank)[axis]}" if rank in sizes.ranks else "."
                for rank in range(layout.world_size)
            ]
            rows.append((name if i == 0 else "", cells))
    label = max(len(name) for name, _ in rows)
    width = max(len(cell) for _, cells in rows for cell in cells)
    lines = [f"{name:<{label}}  " + " ".join(f"{cell:>{width}}" for cell in cells) for name, cells in rows]
    lines.insert(1, "-" * len(lines[0]))
    return lines


def _spans(layout: MimoLayout) -> list[str]:
    """One line per module, for layouts with too many ranks for one column each."""
    label = max(len(name) for name in layout.modules)
    lines = []
    for name, sizes in layout.modules.items():
        stages = [
            sizes.ranks[i * len(sizes.ranks) // sizes.pp :][: len(sizes.ranks) // sizes.pp] for i in range(sizes.pp)
        ]
        line = f"{name:<{label}}  ranks {span_of(sizes.ranks)}"
        if sizes.pp > 1:
            line += f", pipeline stages {', '.join(map(span_of, stages))}"
        lines.append(line)
    return lines


def _sizes(sizes: ResolvedParallelism) -> str:
    text = " ".join(f"{axis}={size}" for axis, size in zip(DENSE_AXES, sizes.shape, strict=True))
    if sizes.ep > 1 or sizes.expt_tp > 1:
        text += f" (experts: expt_tp={sizes.expt_tp} ep={sizes.ep} expt_dp={sizes.expt_dp})"
    return text


def _bridge(name: str, layout: MimoLayout) -> str:
    source, target = layout.modules[name].dp, layout.modules[LANGUAGE].dp
    if source > target:
        how = f"fan-in, {source // target} replicas into 1"
    elif source < target:
        how = f"fan-out, 1 replica into {target // source}"
    else:
        how = "replica to replica"
    return f"bridge {name} -> {LANGUAGE}: dp {source} -> {target}, {how}"

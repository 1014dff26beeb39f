"""Prints a table of the entire model before training, gathered from all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, override

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from megatron.core.utils import unwrap_model

from lightning_mimo.callbacks.observed import observed_strategy
from lightning_mimo.mimo.initialization import shard_group
from lightning_mimo.mimo.model import RaggedMimoModel, module_and_name
from lightning_mimo.mimo.parameter_names import lies_under, named_parameters_of
from lightning_mimo.parallel.infra import MimoModelInfra

_COLUMNS = ("name", "type", "parameters", "trainable", "ranks", "per rank")


@dataclass(frozen=True, kw_only=True)
class HeldParameter:
    """One parameter of a rank, or its shard of one.

    Attributes:
        path: name of the parameter, the same in every layout; it begins with the name of the module.
        whole: number of elements, all shards together.
        here: number of elements on this rank.
        size: bytes per element.
        trainable: whether the parameter is trained.
    """

    path: str
    whole: int
    here: int
    size: int
    trainable: bool


@dataclass(frozen=True, kw_only=True)
class HeldModules:
    """Parameters on one rank, and the class name of every submodule by path."""

    parameters: Sequence[HeldParameter]
    types: Mapping[str, str]


class MimoModelSummary(ModelSummary):
    """Lists all modules with their parameters and ranks. MimoStrategy replaces Lightning's model summary with it."""

    def __init__(self, max_depth: int = 1) -> None:
        """
        Args:
            max_depth: 1 lists the modules, 2 also their submodules, and so on; 0 prints nothing.
        """
        super().__init__(max_depth=max_depth)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Print the table. Collective over the world."""
        if not self._max_depth:
            return
        infra = observed_strategy(trainer, self).infra
        held: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(held, held_modules(pl_module.model, infra, max_depth=self._max_depth))
        rank_zero_info("\n" + draw_summary(held, list(infra.layout.modules), max_depth=self._max_depth))


def replace_model_summary(callbacks: list[pl.Callback]) -> None:
    """Replace Lightning's model summaries, which would show only the modules on rank 0, by a MimoModelSummary."""
    for place, callback in enumerate(callbacks):
        if isinstance(callback, ModelSummary) and type(callback) in (ModelSummary, RichModelSummary):
            callbacks[place] = MimoModelSummary(max_depth=callback._max_depth)


def held_modules(model: RaggedMimoModel, infra: MimoModelInfra, *, max_depth: int) -> HeldModules:
    """Return the parameters of this rank and its submodules down to a depth."""
    parameters: list[HeldParameter] = []
    types: dict[str, str] = {}
    for name in infra.participating_modules:
        for path, parameter in named_parameters_of(model, infra, name):
            group = shard_group(parameter, infra.pg_collections[name])
            parameters.append(
                HeldParameter(
                    path=path,
                    whole=parameter.numel() * (group.size() if group is not None else 1),
                    here=parameter.numel(),
                    size=parameter.element_size(),
                    trainable=parameter.requires_grad,
                )
            )
        module, _ = module_and_name(model, name)
        for path, part in unwrap_model(module).named_modules(prefix=name):
            if path.count(".") < max_depth:
                types[path] = type(part).__name__
    return HeldModules(parameters=parameters, types=types)


def draw_summary(held: Sequence[HeldModules], modules: Sequence[str], *, max_depth: int) -> str:
    """Draw the table: one line per module or submodule, and a line with the sum.

    Args:
        held: parameters and submodules of each rank, by rank.
        modules: names of the modules, in the order of the layout.
        max_depth: 1 lists the modules only.
    """
    rows = [_row(held, path) for module in modules for path in _parts(held, module, max_depth)]
    everything = {each.path: each for rank in held for each in rank.parameters}.values()
    rows.append(_row(held, ""))
    widths = [max(len(row[i]) for row in [_COLUMNS, *rows]) for i in range(len(_COLUMNS))]
    rule = "-" * (sum(widths) + 3 * (len(widths) - 1))
    lines = [_line(row, widths) for row in rows]
    size = sum(each.whole * each.size for each in everything)
    return "\n".join(
        [_line(_COLUMNS, widths), rule, *lines[:-1], rule, lines[-1], f"{_bytes(size)} of parameters in all"]
    )


def _parts(held: Sequence[HeldModules], module: str, max_depth: int) -> list[str]:
    """Paths of a module and of its submodules with parameters, each after its parent."""
    order: dict[str, int] = {}
    for names in (each.path.split(".") for rank in held for each in rank.parameters if lies_under(each.path, module)):
        for depth in range(1, min(max_depth, len(names) - 1) + 1):
            order.setdefault(".".join(names[:depth]), len(order))
    return sorted(order, key=lambda path: [order[path[:end]] for end in _ends(path)])


def _ends(path: str) -> list[int]:
    """Positions at which the path of each parent ends, and the length of the path."""
    return [*(i for i, character in enumerate(path) if character == "."), len(path)]


def _row(held: Sequence[HeldModules], path: str) -> tuple[str, ...]:
    """Cells of the line for a path; an empty path means all modules."""
    by_rank = [[each for each in rank.parameters if not path or lies_under(each.path, path)] for rank in held]
    whole = {each.path: each for rank in by_rank for each in rank}.values()
    ranks = [rank for rank, parameters in enumerate(by_rank) if parameters]
    counts = [sum(each.here for each in by_rank[rank]) for rank in ranks]
    count = sum(each.whole for each in whole)
    trainable = sum(each.whole for each in whole if each.trainable)
    kind = next((rank.types[path] for rank in held if path in rank.types), "")
    return (
        path or "all",
        kind,
        _count(count),
        "all" if trainable == count else _count(trainable) if trainable else "frozen",
        _ranges(ranks),
        _count(max(counts)) if max(counts) == min(counts) else f"{_count(min(counts))} to {_count(max(counts))}",
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "   ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _count(number: int) -> str:
    return get_human_readable_count(number).strip()


def _bytes(number: int) -> str:
    return f"{number / 1e6:.3g} MB" if number < 1e9 else f"{number / 1e9:.3g} GB"


def _ranges(ranks: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

"""Fills a model with weights from files before its first step: what each parameter starts from, and a table of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.distributed as dist

from lightning_mimo.checkpoint.shards import ShardSpec
from lightning_mimo.checkpoint.sources import Shapes, WeightSource
from lightning_mimo.checkpoint.state import load_shards
from lightning_mimo.errors import CheckpointError, ConfigError
from lightning_mimo.mimo.model import RaggedMimoModel
from lightning_mimo.mimo.parameter_names import lies_under, module_of, named_buffers_of, named_parameters_of, part_of
from lightning_mimo.optim.mimo_optimizer import SingleSyncMimoOptimizer
from lightning_mimo.parallel.infra import MimoModelInfra

SEED = -1
"""In the place of a source's position: the parameter starts from the run's seed."""


@dataclass(frozen=True, kw_only=True)
class Origins:
    """What parameters start from.

    Attributes:
        found: global name -> position of the source that holds it, or ``SEED``.
        problems: parameters that start from nothing, one sentence for each.
        missing: their names.
    """

    found: Mapping[str, int]
    problems: Sequence[str]
    missing: Sequence[str]


def find_origins(held: Shapes, sources: Sequence[WeightSource], init_missing: Collection[str]) -> Origins:
    """Choose the first source that holds a parameter in its shape; the seed for what no source holds and is named.

    Args:
        held: parameters of the model, or of a rank.
        sources: where weights may come from, the most important first.
        init_missing: names of modules or submodules that may start from the seed.
    """
    found: dict[str, int] = {}
    problems, missing = [], []
    for name, shape in held.items():
        holding = [place for place, source in enumerate(sources) if name in source.shapes]
        fitting = [place for place in holding if sources[place].shapes[name] == tuple(shape)]
        # A tensor of another shape in the first source is a mistake, even if a later one has the right shape.
        if fitting and fitting[0] == holding[0]:
            found[name] = fitting[0]
        elif any(lies_under(name, each) for each in init_missing):
            found[name] = SEED
        else:
            missing.append(name)
            problems.append(_problem(name, tuple(shape), [sources[place] for place in holding] or sources))
    return Origins(found=found, problems=problems, missing=missing)


def _problem(name: str, shape: tuple[int, ...], sources: Sequence[WeightSource]) -> str:
    first = sources[0]
    if name in first.shapes:
        return f"{first.label} holds {name!r} with the shape {first.shapes[name]}, but this model has {shape}"
    return f"{' and '.join(source.label for source in sources)} does not hold {name!r}, which this model has"


def check_origins(origins: Origins, init_missing: Sequence[str]) -> None:
    """Refuse a model of which some parameters start from nothing, or names that are not needed.

    Args:
        origins: of all parameters of the model.
        init_missing: as for :func:`find_origins`.

    Raises:
        CheckpointError: naming a parameter, and what to write if it is to start from the seed.
        ConfigError: naming an entry of ``init_missing`` under which nothing starts from the seed.
    """
    if origins.problems:
        parts = sorted({part_of(name) for name in origins.missing})
        more = f" (and {len(origins.problems) - 1} more such parameters)" if len(origins.problems) > 1 else ""
        raise CheckpointError(
            f"{origins.problems[0]}{more}. If it is to start from the seed, say so: init_missing="
            f"{[*init_missing, *parts]}; otherwise give a source that holds it."
        )
    new = [name for name, place in origins.found.items() if place == SEED]
    for each in init_missing:
        if not any(lies_under(name, each) for name in new):
            held = any(lies_under(name, each) for name in origins.found)
            why = "all of it is in the files" if held else "no parameter of the model lies under this name"
            raise ConfigError(f"init_missing names {each!r}, but {why}. Leave it out.")


def fill(
    model: RaggedMimoModel,
    infra: MimoModelInfra,
    optimizer: SingleSyncMimoOptimizer | None,
    *,
    sources: Sequence[WeightSource],
    init_missing: Sequence[str],
) -> str:
    """Load initial weights into the model, and into the optimizer's copies of them. Collective over the world.

    Args:
        model: built, with the weights of the seed where ``init_missing`` says so; its parameters are gathered.
        infra: process groups.
        optimizer: whose copies of weights are filled, too; its state is unchanged.
        sources: as for :func:`find_origins`.
        init_missing: as for :func:`find_origins`.

    Returns:
        A table of what was loaded, made new and left out.

    Raises:
        CheckpointError: on every rank, if a file is damaged or something is missing. Nothing was changed.
        ConfigError: on every rank, if ``init_missing`` names what is not missing.
    """
    held = {
        name: ShardSpec.of(parameter, infra.pg_collections[module]).shape
        for module in infra.participating_modules
        for name, parameter in named_parameters_of(model, infra, module)
    }
    # Buffers keep the values that they were built with where no source holds them.
    held |= {
        name: tuple(buffer.shape)
        for module in infra.participating_modules
        for name, buffer in named_buffers_of(model, infra, module)
        if any(name in source.shapes for source in sources)
    }
    own = find_origins(held, sources, init_missing)
    shapes, origins = _of_all_ranks(held, own, sources)
    check_origins(origins, init_missing)
    for place, source in enumerate(sources):
        names = {name for name, origin in own.found.items() if origin == place}
        if names:
            with source.open(infra.participating_modules) as reader:
                load_shards(model, infra, reader, optimizer, names=names)
    return draw_table(shapes, origins.found, sources)


def _of_all_ranks(
    held: Shapes, own: Origins, sources: Sequence[WeightSource]
) -> tuple[dict[str, tuple[int, ...]], Origins]:
    """Parameters of all ranks and their origins, the same on every rank.

    Raises:
        CheckpointError: on every rank, if one has found a damaged file.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    damage = [f"{source.label}: {each}" for source in sources for each in source.damage(rank=rank, ranks=ranks)]
    everywhere: list[Any] = [None] * ranks
    dist.all_gather_object(everywhere, (dict(held), own, damage))
    if damaged := [each for _, _, problems in everywhere for each in problems]:
        raise CheckpointError(f"{damaged[0]}. Nothing was changed.")
    shapes = {name: shape for each, _, _ in everywhere for name, shape in each.items()}
    problems = {
        name: problem for _, each, _ in everywhere for name, problem in zip(each.missing, each.problems, strict=True)
    }
    found = {name: place for _, each, _ in everywhere for name, place in each.found.items()}
    return shapes, Origins(found=found, problems=list(problems.values()), missing=list(problems))


def draw_table(shapes: Shapes, found: Mapping[str, int], sources: Sequence[WeightSource]) -> str:
    """Draw what every part of the model starts from, and what of the sources is left out.

    Args:
        shapes: of all parameters of the model.
        found: as of :class:`Origins`.
        sources: the sources.
    """
    counts: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for name, place in found.items():
        count = counts[part_of(name), place]
        count[0] += 1
        count[1] += prod(shapes[name])
    rows = [("initial weights of", "tensors", "elements", "from")]
    rows += [
        (part, str(tensors), f"{elements:,}", "the seed" if place == SEED else sources[place].label)
        for (part, place), (tensors, elements) in sorted(counts.items(), key=lambda row: _order(row[0][0], found))
    ]
    for source in sources:
        left: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        unused = {name: shape for name, shape in source.shapes.items() if found.get(name, SEED) == SEED}
        for name, shape in {**unused, **source.others}.items():
            left[part_of(name)][0] += 1
            left[part_of(name)][1] += prod(shape)
        rows += [
            (f"left out: {part}", str(tensors), f"{elements:,}", source.label)
            for part, (tensors, elements) in left.items()
        ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{a:{widths[0]}}   {b:>{widths[1]}}   {c:>{widths[2]}}   {d}" for a, b, c, d in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _order(part: str, found: Mapping[str, int]) -> tuple[int, str]:
    modules = list(dict.fromkeys(module_of(name) for name in found))
    return modules.index(module_of(part)), part

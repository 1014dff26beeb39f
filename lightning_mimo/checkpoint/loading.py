"""Checks a checkpoint against a run completely, and then loads it into the model and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_mimo.checkpoint.directory import TRAINER, damaged_files, read_manifest
from lightning_mimo.checkpoint.manifest import Manifest
from lightning_mimo.checkpoint.reader import GENERATOR, CheckpointReader
from lightning_mimo.checkpoint.saving import Generators, generators, layout_as_dict
from lightning_mimo.checkpoint.shards import ShardSpec
from lightning_mimo.checkpoint.state import load_shards, problems_of_shards
from lightning_mimo.errors import CheckpointError
from lightning_mimo.mimo.model import RaggedMimoModel
from lightning_mimo.mimo.parameter_names import named_buffers_of, named_parameters_of
from lightning_mimo.optim.optimizer import MimoTorchOptimizer
from lightning_mimo.parallel.infra import MimoModelInfra

TrainerCheck = Callable[[Mapping[str, Any]], Iterator[str]]
"""Yields the problems of the state of Lightning's trainer in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A checkpoint that fits the run.

    Attributes:
        path: the directory.
        manifest: its manifest.
        trainer: the state of Lightning's trainer.
        states: states of this rank's random generators; ``None`` if it was saved in another layout.
    """

    path: Path
    manifest: Manifest
    trainer: dict[str, Any]
    states: Generators | None

    def load(self, model: RaggedMimoModel, infra: MimoModelInfra, optimizer: MimoTorchOptimizer | None) -> None:
        """Load this rank's weights, and the optimizer if given."""
        with CheckpointReader(self.path, infra.participating_modules, self.manifest) as reader:
            load_shards(model, infra, reader, None if optimizer is None else optimizer.mimo)
        if optimizer is not None:
            optimizer.load_plain_state(self.trainer["optimizer_states"][0])


def check(
    path: Path,
    model: RaggedMimoModel,
    infra: MimoModelInfra,
    optimizer: MimoTorchOptimizer | None,
    *,
    check_manifest: Callable[[Manifest], Iterator[str]],
    check_trainer: TrainerCheck,
) -> Checked:
    """Check that a checkpoint is complete, undamaged, and fits the run. Changes nothing. Collective over the world.

    Args:
        path: the directory.
        model: model to fill.
        infra: process groups.
        optimizer: optimizer to fill; ``None`` checks weights only.
        check_manifest: yields the reasons why training cannot resume; called if an optimizer is given.
        check_trainer: yields the problems of the state of Lightning's trainer.

    Raises:
        CheckpointError: on every rank, naming the file, the parameter or the field.
    """
    manifest = _check_files(path, model, infra)
    problems = [] if optimizer is None else list(check_manifest(manifest))
    _raise_on_all(path, problems)
    trainer: dict[str, Any] = {}
    states: Generators | None = None
    try:
        trainer = _plain_content(path / TRAINER)
        problems.extend(_trainer_problems(trainer, manifest, optimizer))
        if not problems:
            problems.extend(check_trainer(trainer))
        with CheckpointReader(path, infra.participating_modules, manifest) as reader:
            mimo = None if optimizer is None else optimizer.mimo
            has_state = optimizer is not None and not problems and _has_updated(manifest, trainer)
            problems.extend(problems_of_shards(model, infra, reader, mimo, has_state=has_state))
            if optimizer is not None and manifest["layout"] == layout_as_dict(infra.layout):
                states = _read_generators(reader)
                problems.extend(_generator_problems(states))
    except (CheckpointError, OSError) as error:
        problems.append(str(error).rstrip("."))
    _raise_on_all(path, problems)
    return Checked(path=path, manifest=manifest, trainer=trainer, states=states or None)


def _check_files(path: Path, model: RaggedMimoModel, infra: MimoModelInfra) -> Manifest:
    """Check manifest, sizes, checksums, names and shapes. All ranks together read each file once."""
    problems: list[str] = []
    held: dict[str, list[int]] = {}
    manifest: Any = {"parameters": {}}
    try:
        manifest = read_manifest(path)
        problems.extend(damaged_files(path, manifest, rank=dist.get_rank(), ranks=dist.get_world_size()))
        held = _shapes(model, infra)
        problems.extend(_mismatches(held, manifest["parameters"]))
    except (CheckpointError, OSError) as error:
        problems.append(str(error).rstrip("."))
    names = [name for each in _raise_on_all(path, problems, list(held)) for name in each]
    extra = set(manifest["parameters"]) - set(names)
    _raise_on_all(path, [f"it holds {name!r}, which this model does not have" for name in sorted(extra)])
    return manifest


def _raise_on_all(path: Path, problems: Iterable[str], also: Sequence[str] = ()) -> list[Sequence[str]]:
    """Raise the first problem of any rank on all ranks. Collective. Returns the ``also`` of all ranks."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (list(problems), also))
    if found := [problem for each, _ in everywhere for problem in each]:
        different = list(dict.fromkeys(found))
        more = f" (and {len(different) - 1} more problems)" if len(different) > 1 else ""
        raise CheckpointError(f"The checkpoint {path} cannot be loaded: {different[0]}{more}. Nothing was changed.")
    return [each for _, each in everywhere]


def _shapes(model: RaggedMimoModel, infra: MimoModelInfra) -> dict[str, list[int]]:
    """Global name -> full shape of all parameters and persistent buffers of this rank."""
    shapes = {
        name: list(ShardSpec.of(parameter, infra.pg_collections[module]).shape)
        for module in infra.participating_modules
        for name, parameter in named_parameters_of(model, infra, module)
    }
    for module in infra.participating_modules:
        shapes |= {name: list(buffer.shape) for name, buffer in named_buffers_of(model, infra, module)}
    return shapes


def _mismatches(held: Mapping[str, list[int]], saved: Mapping[str, list[int]]) -> list[str]:
    missing = [f"it does not hold {name!r}, which this model has" for name in held if name not in saved]
    return missing + [
        f"{name!r} has the shape {tuple(saved[name])} there and {tuple(shape)} in this model"
        for name, shape in held.items()
        if name in saved and saved[name] != shape
    ]


def _plain_content(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        raise CheckpointError(
            f"{file} is damaged, or holds objects that could only be read by executing code from it, so it was not "
            f"written by lightning-mimo ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__} in place of the state of a trainer")
    return content


def _trainer_problems(
    trainer: Mapping[str, Any], manifest: Manifest, optimizer: MimoTorchOptimizer | None
) -> Iterator[str]:
    for key, expected in (("global_step", manifest["step"]), ("epoch", manifest["epoch"])):
        if trainer.get(key) != expected or type(trainer.get(key)) is not int:
            yield f"{TRAINER} has {key}={trainer.get(key)!r}, but the manifest has {expected}"
    if optimizer is None:
        return
    states = trainer.get("optimizer_states")
    if not isinstance(states, list) or len(states) != 1:
        yield f"{TRAINER} must have the state of one optimizer in 'optimizer_states'"
    else:
        yield from (f"{TRAINER}: {problem}" for problem in optimizer.problems_of_plain_state(states[0]))


def _has_updated(manifest: Manifest, trainer: Mapping[str, Any]) -> bool:
    return manifest["step"] > trainer["optimizer_states"][0]["skipped_steps"]


def _read_generators(reader: CheckpointReader) -> Generators:
    """Read the states of this rank's random generators, which are with the first of its modules."""
    prefix = f"rank{dist.get_rank()}."
    names = [name for name in reader.names() if name.startswith(prefix)]
    return {name.removeprefix(prefix): reader.whole(name, GENERATOR) for name in names}


def _generator_problems(states: Generators) -> Iterator[str]:
    now = generators()
    if states and set(states) != set(now):
        yield f"it has the random generators {sorted(states)}, but this run has {sorted(now)}"
        return
    for name, state in states.items():
        if (state.dtype, state.shape) != (now[name].dtype, now[name].shape):
            yield (
                f"the state of the random generator {name!r} has {tuple(state.shape)} elements of {state.dtype}, but "
                f"that of this run has {tuple(now[name].shape)} of {now[name].dtype}"
            )

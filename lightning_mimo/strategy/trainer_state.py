"""Checks the state of Lightning's Trainer in a checkpoint before anything of the checkpoint is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from packaging.version import InvalidVersion, Version

_LOOPS = {
    TrainerFn.FITTING: "fit_loop",
    TrainerFn.VALIDATING: "validate_loop",
    TrainerFn.TESTING: "test_loop",
    TrainerFn.PREDICTING: "predict_loop",
}


def problems_of_trainer_state(trainer: pl.Trainer, state: Mapping[str, Any]) -> Iterator[str]:
    """Yield the reasons why Lightning could not restore a Trainer from a state, or not completely.

    Args:
        trainer: the Trainer, with its stage set up.
        state: the dictionary that Lightning dumped.
    """
    try:
        Version(state.get("pytorch-lightning_version"))  # type: ignore[arg-type]  # that is the question
    except (InvalidVersion, TypeError):
        yield f"trainer.pt has the version of Lightning {state.get('pytorch-lightning_version')!r}"
    if not isinstance(state.get("callbacks", {}), Mapping):
        yield f"trainer.pt has a {type(state['callbacks']).__name__} as callbacks"
    is_fitting = trainer.state.fn == TrainerFn.FITTING
    assert trainer.state.fn is not None
    name = _LOOPS[trainer.state.fn]
    loops = state.get("loops")
    if loops is not None or is_fitting:  # an imported checkpoint has none
        if not isinstance(loops, Mapping):
            yield f"trainer.pt has a {type(loops).__name__} as loops"
            return
        expected = getattr(trainer, name).state_dict()
        differences = list(_differences(loops.get(name), expected, name))
        yield from (f"trainer.pt: {problem}" for problem in differences)
        if is_fitting and not differences:
            yield from _problems_of_loader(loops[name])
    if is_fitting:
        schedulers, configured = state.get("lr_schedulers"), len(trainer.lr_scheduler_configs)
        if not isinstance(schedulers, list) or not all(isinstance(each, Mapping) for each in schedulers):
            yield "trainer.pt has no list of learning-rate schedulers"
        elif len(schedulers) != configured:
            yield (
                f"it has the state of {len(schedulers)} learning-rate schedulers, but configure_optimizers() "
                f"of this run returns {configured}; resume with the same schedulers"
            )


def _problems_of_loader(fit_loop: Any) -> Iterator[str]:
    """Yield why the position in the training data, of a run that had begun to train, is not what a loader saves."""
    try:
        loaders = fit_loop["state_dict"].get("combined_loader", [{"batches": 0}])
        (loader,) = loaders
        is_count = type(loader["batches"]) is int and loader["batches"] >= 0
    except (KeyError, TypeError, ValueError, AttributeError):
        is_count = False
    if not is_count:
        yield "trainer.pt: fit_loop.state_dict.combined_loader is not the state of one DataLoader"


def _differences(found: Any, expected: Any, place: str) -> Iterator[str]:
    """Yield where counters of loops are missing or are not counters. Further entries are allowed."""
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            yield f"{place} is missing, or is not a dictionary"
            return
        for key, value in expected.items():
            yield from _differences(found.get(key), value, f"{place}.{key}")
    elif type(expected) is bool:
        if type(found) is not bool:
            yield f"{place} is {found!r}, but must be true or false"
    elif type(expected) is int and (type(found) is not int or found < 0):
        yield f"{place} is {found!r}, but must be a whole number of at least 0"

"""The order of samples over all ranks, as a function of the seed and the epoch only."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import RandomSampler, Sampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_mimo.errors import DataError
from lightning_mimo.parallel.random import seed_for

SamplerStates = Sequence[tuple[int, Any]]
"""Pairs of an epoch and the state of the user's sampler from which it draws the order of this epoch."""

_DRAWN = "_lightning_mimo_epochs_drawn"  # attribute of a user's sampler


class SeededSampler(Sampler[int]):
    """The order of samples in each epoch, from a user's sampler. Lightning sets the epoch through ``set_epoch``.

    A sampler that remembers something (a generator of its own, a counter) is asked once per epoch, in order, however
    often the loader is iterated. To resume in a later epoch, it is brought to where it was: by its ``state_dict`` or
    the state of its generator from the checkpoint, or by drawing the orders of all epochs before.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        *,
        seed: int,
        first_epoch: int = 0,
        resumed: bool = False,
        saved: SamplerStates = (),
    ) -> None:
        """
        Args:
            sampler: the user's sampler; what it draws from torch's, numpy's and Python's default generators is made to
                depend on the seed and the epoch only. Its ``set_epoch``, if it has one, is called.
            seed: the run's seed, the same on all ranks.
            first_epoch: epoch whose order a new sampler gives first.
            resumed: whether the run goes on from a checkpoint.
            saved: states from the checkpoint.
        """
        self._sampler = sampler
        self._seed = seed
        self._next = first_epoch  # the epoch whose order the sampler would give now
        self._first = first_epoch
        self._resumed = resumed
        self._saved = dict(saved)
        self._states: dict[int, Any] = {}
        self._last: tuple[int, list[int]] | None = None
        self.epoch = first_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def states(self) -> SamplerStates:
        """State of the user's sampler before this epoch and before the next one, if it has a state."""
        return [(epoch, state) for epoch, state in self._states.items() if state is not None]

    @property
    def is_known(self) -> bool:
        """Whether the order of this epoch can be given without advancing the state of the user's sampler."""
        is_drawn = self._last is not None and self._last[0] == self.epoch
        return is_drawn or isinstance(self._sampler, SequentialSampler) or _depends_on_epoch_only(self._sampler)

    @property
    def name_and_state(self) -> tuple[str, Any]:
        """Class of the user's sampler, and its state now; ``None`` if it has none that could be saved."""
        return type(self._sampler).__name__, _state_of(self._sampler)

    def __len__(self) -> int:
        return len(cast(Sized, self._sampler))

    def __iter__(self) -> Iterator[int]:
        if isinstance(self._sampler, SequentialSampler):
            yield from self._sampler
            return
        if self._last is None or self._last[0] != self.epoch:
            self._last = self.epoch, self._order_of(self.epoch)
        yield from self._last[1]

    def _order_of(self, epoch: int) -> list[int]:
        if _depends_on_epoch_only(self._sampler):
            return self._draw(epoch)
        if epoch in self._saved:
            _restore(self._sampler, self._saved[epoch])
            self._next = epoch
        elif self._resumed:
            self._check_can_catch_up(epoch)
        self._saved, self._resumed = {}, False
        for missed in range(self._next, epoch):
            self._draw(missed)
        self._states = {epoch: _state_of(self._sampler)}
        order = self._draw(epoch)
        self._next = epoch + 1
        self._states[self._next] = _state_of(self._sampler)
        return order

    def _draw(self, epoch: int) -> list[int]:
        set_epoch = getattr(self._sampler, "set_epoch", None)
        with isolate_rng(include_cuda=False):
            seed_generators(seed_for(self._seed, f"order/{epoch}"))
            if callable(set_epoch):
                set_epoch(epoch)
            # An endless sampler is taken at its word, its length.
            order = list(islice(self._sampler, len(self)))
        if hasattr(self._sampler, "__dict__"):
            vars(self._sampler)[_DRAWN] = self._drawn_before + 1
        return order

    @property
    def _drawn_before(self) -> int:
        return getattr(self._sampler, _DRAWN, 0)

    def _check_can_catch_up(self, epoch: int) -> None:
        """Account for epochs that an earlier run in this process has drawn from the same sampler."""
        drawn = self._first + self._drawn_before
        if drawn > epoch:
            raise DataError(
                f"The run resumes in epoch {epoch}, but the sampler {type(self._sampler).__name__} has already given "
                f"the orders of {self._drawn_before} epochs in this process, and it cannot be taken back. Make a new "
                f"sampler, or give it set_epoch(epoch), or state_dict() and load_state_dict()."
            )
        self._next = drawn


def seed_generators(seed: int) -> None:
    """Seed the default generators of Python, numpy and torch's CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)


def _depends_on_epoch_only(sampler: Any) -> bool:
    if _has_state_dict(sampler):
        return False
    return callable(getattr(sampler, "set_epoch", None)) or (_is_torchs(sampler) and sampler.generator is None)


def _state_of(sampler: Any) -> Any:
    if _has_state_dict(sampler):
        return copy.deepcopy(sampler.state_dict())
    generator = sampler.generator if _is_torchs(sampler) else None
    return None if generator is None else {"generator": generator.get_state()}


def _restore(sampler: Any, state: Any) -> None:
    if _has_state_dict(sampler):
        sampler.load_state_dict(state)
    elif _is_torchs(sampler) and sampler.generator is not None:
        sampler.generator.set_state(state["generator"])


def _has_state_dict(sampler: object) -> bool:
    return all(callable(getattr(sampler, name, None)) for name in ("state_dict", "load_state_dict"))


def _is_torchs(sampler: Any) -> Any:
    return type(sampler) in (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)

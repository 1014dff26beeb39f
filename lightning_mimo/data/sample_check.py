"""Checks that all ranks hold the same sample at the same place of a global batch.

What an encoder makes of a sample goes to the language rank that holds the sample at the same position. If a sampler or
a dataset gives ranks different samples there, features reach the wrong text, and nothing else would notice.

:func:`check_samples` compares every sample and names the one that differs, for a collective of its own.
:class:`SampleChecksums` costs none: what ranks hold is compared by a few numbers that are added up with those of the
step, and only where these disagree is the former asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lightning_mimo.errors import DataError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.parallel.host_copies import to_device

_ABSENT = torch.iinfo(torch.int64).min // 2
_EMPTY = -2  # in place of all three, where a packed row has no more samples
_INDEX, _TEXT, _OWN = 0, 1, 2
NOT_LOADED = -1
"""Stands for the checksum of what a rank does not load of a sample."""
# Odd, and about as many ones as zeros.
_PRIMES = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB)
# Squares of so many bits, added up over some thousand ranks and multiplied by their number, are exact in float64.
_BITS = 14


class SampleChecksums:
    """What this rank holds of one or more global batches, in a few numbers to be added up over all ranks.

    The samples of a batch fall into blocks, of which every replica of a module holds whole ones. For each block and
    module there are two checksums: of index and text, on which all modules must agree, and of what else the module
    takes of the samples. Of each, three numbers are added up: how many ranks have it, the checksum, and its square. The
    checksums are equal if number * squares = sum^2.
    """

    def __init__(
        self, layout: MimoLayout, *, global_batch_size: int, device: torch.device, enabled: bool = True
    ) -> None:
        """
        Args:
            layout: which modules there are.
            global_batch_size: samples over all ranks.
            device: of this rank.
            enabled: whether to compare anything; the same on every rank.
        """
        self._enabled = enabled
        self._layout = layout
        self._names = list(layout.modules)
        self._global_batch_size = global_batch_size
        self._device = device
        blocks = math.lcm(*(sizes.dp for sizes in layout.modules.values()))
        self._shape = blocks, len(self._names), 2
        self._batches: list[list[Microbatch]] = []

    def add(self, microbatches: Sequence[Microbatch]) -> None:
        """Another batch of this rank; nothing where it is not known."""
        if self._enabled and microbatches:
            self._batches.append(
                [
                    {"sample_fingerprints": each["sample_fingerprints"], "is_packed": each.get("is_packed", False)}
                    for each in microbatches
                ]
            )

    def figures(self) -> torch.Tensor:
        """float64 ``[3 * blocks * modules * 2]``, to be added up over all ranks."""
        if not self._enabled:
            return torch.zeros(0, dtype=torch.float64, device=self._device)
        sums = np.zeros(self._shape, np.int64)
        is_held = np.zeros(self._shape, np.int64)
        for number, microbatches in enumerate(self._batches):
            size = self._global_batch_size // len(microbatches)
            for module, name in enumerate(self._names):
                own = [
                    each["sample_fingerprints"][name] for each in microbatches if name in each["sample_fingerprints"]
                ]
                if own:
                    position, in_row, index, text, contents = np.concatenate(own).T
                    block = position % size // (size // self._shape[0])
                    place = position + number * self._global_batch_size + (in_row << 32)
                    checksums = np.stack([_mixed(place, index, text), _mixed(place, contents, contents)], axis=1)
                    np.add.at(sums, (block, module), checksums)
                    is_held[block, module] = np.stack([index >= 0, contents != NOT_LOADED], axis=1)
        checksums = ((sums ^ (sums >> 31)) & (2**_BITS - 1)) * is_held
        figures = np.stack([is_held, checksums, checksums**2]).astype(np.float64)
        return to_device(torch.from_numpy(figures.ravel()), self._device)

    def differ(self, totals: Sequence[float]) -> bool:
        """Whether ranks hold different samples.

        Args:
            totals: :meth:`figures`, added up over all ranks.
        """
        if not totals:
            return False
        figures = np.array(totals).reshape(3, *self._shape)
        return _differ(*figures[..., 0].sum(axis=-1)) or _differ(*figures[..., 1])

    def check(self, totals: Sequence[float]) -> None:
        """Compare. Collective over the world where something differs.

        Args:
            totals: :meth:`figures`, added up over all ranks.

        Raises:
            DataError: on every rank, naming the first sample that differs, and which rank holds what there.
        """
        if not self.differ(totals):
            return
        for microbatches in self._batches:
            check_samples(microbatches, self._layout, global_batch_size=self._global_batch_size, device=self._device)
        raise AssertionError("checksums differ, but no sample does")


def _differ(number: np.ndarray, total: np.ndarray, squares: np.ndarray) -> bool:
    return bool((number * squares != total**2).any())


def _mixed(place: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Checksums of which sums over several places still tell whether one of them differs. int64, wraps around."""
    mixed = place * _PRIMES[0] + first * _PRIMES[1] + second * _PRIMES[2]
    mixed = (mixed ^ (mixed >> 29)) * _PRIMES[1]
    return mixed ^ (mixed >> 32)


def check_samples(
    microbatches: Sequence[Microbatch], layout: MimoLayout, *, global_batch_size: int, device: torch.device
) -> None:
    """Compare the samples of a global batch over all ranks. Collective over the world: one all-reduce of
    ``modules * global_batch_size * 6`` integers; packed, times the most samples of a row, after one of this number.

    Args:
        microbatches: this rank's share; ``sample_fingerprints`` holds for each of its modules int64
            ``[n, 5]`` of position, place in the row, index in the dataset, checksum of the text, and checksum of what
            else the module takes of the sample (``NOT_LOADED`` where this rank takes nothing).
        layout: which modules there are.
        global_batch_size: samples over all ranks.
        device: where collectives of small tensors take place.

    Raises:
        DataError: on every rank, naming the first position that differs, and which rank holds what there.
    """
    names = list(layout.modules)
    places = _places_in_a_row(microbatches, device)
    held = torch.full((len(names), global_batch_size, places, 3), _ABSENT)
    for microbatch in microbatches:
        for name, fingerprints in microbatch["sample_fingerprints"].items():
            # A place that is empty here must be empty everywhere.
            held[names.index(name), fingerprints[:, 0]] = _EMPTY
            held[names.index(name), fingerprints[:, 0], fingerprints[:, 1]] = torch.from_numpy(fingerprints[:, 2:])
    held = held.flatten(1, 2)
    held[..., _OWN].masked_fill_(held[..., _OWN] == NOT_LOADED, _ABSENT)
    held = to_device(held, device)
    # The largest of a number and of its negative: where nobody disagrees they cancel.
    extremes = torch.stack([held, torch.where(held == _ABSENT, _ABSENT, -held)])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes[0], -extremes[1]
    # Index and text are the same for all modules; the rest is each module's own.
    common = largest[..., :_OWN].amax(dim=0) != smallest[..., :_OWN].amin(dim=0)
    own = (largest[..., _OWN] != smallest[..., _OWN]).any(dim=0)
    different = (common.any(dim=1) | own).tolist()
    if any(different):
        raise DataError(_describe(different.index(True), places, names, held))


def _places_in_a_row(microbatches: Sequence[Microbatch], device: torch.device) -> int:
    """Most samples that any rank has in a row. Collective over the world if rows are packed."""
    if not microbatches or not microbatches[0].get("is_packed", False):
        return 1
    own = [int(each[:, 1].max()) for microbatch in microbatches for each in microbatch["sample_fingerprints"].values()]
    most = torch.tensor(1 + max(own), device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _describe(number: int, places: int, names: Sequence[str], held: torch.Tensor) -> str:
    """Ask all ranks what they hold at a place of a position. Collective over the world."""
    position, in_row = divmod(number, places)
    mine = {name: tuple(held[i, number].tolist()) for i, name in enumerate(names) if held[i, number, _INDEX] != _ABSENT}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    entries = [entry for here in ranks for entry in here.values()]
    if len({entry[_INDEX] for entry in entries}) > 1:
        holders = _by_rank(
            ranks, lambda entry: "no more samples" if entry[_INDEX] == _EMPTY else f"sample {entry[_INDEX]}"
        )
        packed = f", place {in_row} of its row," if places > 1 else ""
        return (
            f"Position {position} of the global batch{packed} holds different samples on different ranks: {holders}. "
            f"The sampler must yield the same indices in the same order everywhere, and the dataset's cost(index), if "
            f"it has one, the same number: neither may depend on the rank, nor draw from a generator that is seeded "
            f"differently on each."
        )
    where = f"Sample {entries[0][_INDEX]} (position {position} of the global batch)"
    if len({entry[_TEXT] for entry in entries}) > 1:
        what, holders = "input_ids", _by_rank(ranks, lambda entry: f"text {entry[_TEXT]:08x}")
    else:
        name = _first_that_differs(ranks)
        what = "labels, loss_mask or position_ids" if name == LANGUAGE else f"inputs for {name!r}"
        only = [{name: here[name]} if name in here and here[name][_OWN] != _ABSENT else {} for here in ranks]
        holders = _by_rank(only, lambda entry: f"contents {entry[_OWN]:08x}")
    return (
        f"{where} has other {what} on some ranks than on others; by checksum: {holders}. The dataset must give the "
        f"same sample under the same index everywhere: sort lists of files, answer no sample that cannot be read with "
        f"another one, and draw at random only from torch's, numpy's or Python's default generators, which are seeded "
        f"for each sample."
    )


def _first_that_differs(ranks: Sequence[Mapping[str, tuple[int, ...]]]) -> str:
    """The module whose ranks take other things of a sample."""
    names = {name for here in ranks for name in here}
    return next(
        name for name in sorted(names) if len({here[name][_OWN] for here in ranks if name in here} - {_ABSENT}) > 1
    )


def _by_rank(ranks: Sequence[Mapping[str, tuple[int, ...]]], describe: Callable[[tuple[int, ...]], str]) -> str:
    """``images: sample 3 on ranks [0], sample 5 on ranks [1]; language: …``"""
    modules: dict[str, dict[str, list[int]]] = {}
    for rank, here in enumerate(ranks):
        for name, entry in here.items():
            modules.setdefault(name, {}).setdefault(describe(entry), []).append(rank)
    return "; ".join(
        f"{name} has {', '.join(f'{what} on ranks {where}' for what, where in entries.items())}"
        for name, entries in modules.items()
    )

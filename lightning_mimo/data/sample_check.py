"""Checks that all ranks hold the same sample at the same place of a global batch.

What an encoder makes of a sample goes to the language rank that holds the sample at the same position. If a sampler or
a dataset gives ranks different samples there, features reach the wrong text, and nothing else would notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from lightning_mimo.errors import DataError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.microbatch import Microbatch

_ABSENT = torch.iinfo(torch.int64).min // 2
_INDEX, _TEXT = 0, 1


def check_samples(
    microbatches: Sequence[Microbatch], layout: MimoLayout, *, global_batch_size: int, device: torch.device
) -> None:
    """Compare the samples of a global batch over all ranks. Collective over the world: one all-reduce of
    ``modules * global_batch_size * 4`` integers.

    Args:
        microbatches: this rank's share; ``sample_fingerprints`` holds for each of its modules an int64 tensor
            ``[n, 3]`` of position, index in the dataset, and checksum of the text.
        layout: which modules there are.
        global_batch_size: samples over all ranks.
        device: where collectives of small tensors take place.

    Raises:
        DataError: on every rank, naming the first position that differs, and which rank holds what there.
    """
    names = list(layout.modules)
    held = torch.full((len(names), global_batch_size, 2), _ABSENT, device=device)
    for microbatch in microbatches:
        for name, sample_fingerprints in microbatch["sample_fingerprints"].items():
            held[names.index(name), sample_fingerprints[:, 0]] = sample_fingerprints[:, 1:].to(device)
    # The largest of a number and of its negative: where nobody disagrees they cancel.
    extremes = torch.stack([held, torch.where(held == _ABSENT, _ABSENT, -held)])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes[0].amax(dim=0), -extremes[1].amax(dim=0)
    different = (largest != smallest).any(dim=1).nonzero().flatten().tolist()
    if different:
        raise DataError(_describe(different[0], names, held))


def _describe(position: int, names: Sequence[str], held: torch.Tensor) -> str:
    """Ask all ranks what they hold at a position. Collective over the world."""
    mine = {
        name: tuple(held[i, position].tolist()) for i, name in enumerate(names) if held[i, position, _INDEX] != _ABSENT
    }
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    indices = {entry[_INDEX] for here in ranks for entry in here.values()}
    if len(indices) > 1:
        holders = _by_rank(ranks, lambda entry: f"sample {entry[_INDEX]}")
        return (
            f"Position {position} of the global batch holds different samples on different ranks: {holders}. The "
            f"sampler must yield the same indices in the same order everywhere: it must not depend on the rank, nor "
            f"draw from a generator that is seeded differently on each."
        )
    holders = _by_rank(ranks, lambda entry: f"text {entry[_TEXT]:08x}")
    return (
        f"Sample {indices.pop()} (position {position} of the global batch) has other input_ids on some ranks than on "
        f"others; by checksum: {holders}. The dataset must give the same sample under the same index everywhere: sort "
        f"lists of files, and draw at random only from torch's, numpy's or Python's default generators, which are "
        f"seeded for each sample."
    )


def _by_rank(ranks: Sequence[Mapping[str, tuple[int, int]]], describe: Callable[[tuple[int, int]], str]) -> str:
    """``images: sample 3 on ranks [0], sample 5 on ranks [1]; language: …``"""
    modules: dict[str, dict[str, list[int]]] = {}
    for rank, here in enumerate(ranks):
        for name, entry in here.items():
            modules.setdefault(name, {}).setdefault(describe(entry), []).append(rank)
    return "; ".join(
        f"{name} has {', '.join(f'{what} on ranks {where}' for what, where in entries.items())}"
        for name, entries in modules.items()
    )

"""Compares a rank's recording with that of one process, and says what a difference looks like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_mimo.mimo.initialization import cut_shard
from lightning_mimo.verification.recorder import Recording, Tensors

LIMIT = 1e-9
"""Largest relative difference that is rounding, in float64."""
_LOGGED_LIMIT = 1e-6  # of losses, which Lightning logs in float32
# A gradient below this part of the largest one is zero but for rounding, and counts as this large.
_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Largest relative difference of one kind on one rank, or over all ranks.

    Attributes:
        value: the difference, relative to the tensor's largest entry.
        name: global name of the parameter; empty for losses.
        ratio: length of what was found along what was expected, over its length: 0.5 if it is half of it. ``None`` if
            it also points elsewhere.
        is_sharded: whether tensor-parallel ranks hold different parts of the parameter.
    """

    value: float = 0.0
    name: str = ""
    ratio: float | None = None
    is_sharded: bool = False


Differences = Mapping[str, Difference]
"""Kind -> the largest difference: ``initial``, ``loss``, ``gradient``, ``weight``."""


def compare(found: Recording, expected: Recording, shards: Mapping[str, tuple[torch.nn.Parameter, Any]]) -> Differences:
    """Compare one rank's recording with that of one process. Not collective.

    Args:
        found: of this rank.
        expected: of one process, which holds full tensors.
        shards: global name -> parameter and process groups, of this rank.
    """
    scale = max((float(tensor.abs().max()) for tensor in expected.gradients[0].values()), default=0.0)

    def largest(tensors: Tensors, whole: Tensors, floor: float) -> Difference:
        return _largest(
            _difference(name, tensor, cut_shard(whole[name], *shards[name]), whole[name], floor)
            for name, tensor in tensors.items()
        )

    losses = zip(found.losses[:1], expected.losses[:1], strict=True)
    return {
        "initial": largest(found.initial, expected.initial, 0.0),
        # Of the first step alone: after a step that differs, all else differs.
        "loss": Difference(value=max((abs(a - b) / (abs(b) or 1.0) for a, b in losses), default=0.0)),
        "gradient": largest(found.gradients[0], expected.gradients[0], _FLOOR * scale)
        if found.gradients
        else Difference(),
        "weight": largest(found.final, expected.final, 0.0),
    }


def _difference(
    name: str, found: torch.Tensor, expected: torch.Tensor, whole: torch.Tensor, floor: float
) -> Difference:
    if found.shape != expected.shape:  # sharded, but not marked as such
        return Difference(value=float("inf"), name=f"{name}, {list(found.shape)} in place of {list(expected.shape)}")
    if not found.numel():
        return Difference()
    scale = max(float(whole.abs().max()), floor)
    value = float((found - expected).abs().max())
    value = float("inf") if value != value else value / scale if scale else value
    length = float((expected * expected).sum())
    ratio = float((found * expected).sum()) / length if length else None
    if ratio is not None and float((found - ratio * expected).abs().max()) > 1e-6 * scale:
        ratio = None
    return Difference(value=value, name=name, ratio=ratio, is_sharded=found.shape != whole.shape)


def _largest(differences: Iterable[Difference]) -> Difference:
    return max(differences, key=lambda each: each.value, default=Difference())


def over_all_ranks(differences: Sequence[Differences]) -> dict[str, Difference]:
    """The largest of each kind."""
    return {kind: _largest(each[kind] for each in differences) for kind in differences[0]}


def are_equal(differences: Differences) -> bool:
    """Whether all differences are rounding."""
    return all(each.value < (_LOGGED_LIMIT if kind == "loss" else LIMIT) for kind, each in differences.items())


def likely_reasons(differences: Differences) -> list[str]:
    """What such differences usually come from, the likeliest first."""
    initial, loss, gradient = (differences[kind] for kind in ("initial", "loss", "gradient"))
    if initial.value >= LIMIT:
        return [
            "an initializer that looks at the shape of a shard, or draws random numbers that depend on the rank "
            "(initialize a full tensor, as fan_in_normal_ does, or draw nothing yourself)",
        ]
    if loss.value >= _LOGGED_LIMIT:
        return [
            "a layer whose output depends on the other samples of a microbatch (batch statistics), on earlier batches, "
            "or on random numbers (dropout)",
            "an encoder that does not return [items, tokens, hidden]",
            "a loss that averages over the microbatch; loss() must return a sum and a count of tokens",
        ]
    if gradient.ratio is not None and abs(gradient.ratio - 1) > LIMIT:
        return [
            f"the gradient is {gradient.ratio:.4g} times that of one process: a parameter that all tensor-parallel "
            f"ranks hold, whose gradient is not summed over them (set parameter.sequence_parallel, or sum it in a "
            f"hook), or a loss that averages where it must sum",
        ]
    return [
        "a parameter that all tensor-parallel ranks hold, whose gradient is not summed over them",
        "a backward function of your own that leaves out a collective",
        "a layer that depends on the other samples of a microbatch",
    ]

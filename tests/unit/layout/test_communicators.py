"""Communicators of every rank: the same on both sides, and how many bytes they take."""

from __future__ import annotations

import pytest

from lightning_mimo import MimoLayout
from lightning_mimo import ModuleParallelism as Cut
from lightning_mimo.layout.communicators import Communicator, communicators

LAYOUTS = {
    "apart": ({"images": Cut(tp=2, dp=2), "language": Cut(tp=2, pp=2, dp=2)}, 12, False),
    "deep": ({"images": Cut(pp=2, dp=1), "audio": Cut(dp=2), "language": Cut(tp=4, dp=1)}, 8, False),
    "experts": ({"images": Cut(dp=2), "language": Cut(tp=2, dp=4, ep=4)}, 10, False),
    "colocated": ({"images": Cut(dp=8), "language": Cut(tp=4, dp=2)}, 8, True),
    "alone": ({"language": Cut(dp=1)}, 1, True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_member_lists_each_communicator_in_the_same_order(name: str) -> None:
    modules, world_size, colocate = LAYOUTS[name]
    layout = MimoLayout.resolve(modules, world_size=world_size, colocate=colocate)
    found = {rank: communicators(layout, rank) for rank in range(world_size)}
    for rank, listed in found.items():
        assert list(listed) == sorted(set(listed))
        for each in listed:
            assert rank in each.ranks
            assert all(each in found[member] for member in each.ranks), f"{each} of rank {rank}"


def test_ranks_of_a_small_layout() -> None:
    layout = MimoLayout.resolve({"images": Cut(), "language": Cut(tp=2, dp=1)}, world_size=3)
    assert communicators(layout, 1) == [
        Communicator(ranks=(0, 1), module="", use="activations sent"),
        Communicator(ranks=(0, 1), module="", use="gradients sent"),
        Communicator(ranks=(0, 1, 2), module="", use="world"),
        Communicator(ranks=(1, 2), module="language", use="model"),
    ]
    # Rank 2 gets its activations from rank 0, which gets its gradient from rank 1.
    assert [each.use for each in communicators(layout, 2)] == ["world", "activations sent", "model"]
    assert [each.use for each in communicators(layout, 1, needs_gradient=lambda *_: False)] == [
        "activations sent",
        "world",
        "model",
    ]


def test_bytes_depend_on_the_number_of_ranks_only() -> None:
    two, three = ((Communicator(ranks=tuple(range(n)), module="", use="world")).nbytes for n in (2, 3))
    assert 2**29 <= two < three < 2**30

"""Communicators of every rank: the same on both sides, and how many bytes they take."""

from __future__ import annotations

import pytest

from lightning_mimo import MimoLayout
from lightning_mimo import ModuleParallelism as Cut
from lightning_mimo.layout.communicators import Communicator, communicators, largest_buffers

LAYOUTS = {
    "apart": ({"images": Cut(tp=2, dp=2), "language": Cut(tp=2, pp=2, dp=2)}, 12, False),
    "deep": ({"images": Cut(pp=2, dp=1), "audio": Cut(dp=2), "language": Cut(tp=4, dp=1)}, 8, False),
    "experts": ({"images": Cut(dp=2), "language": Cut(tp=2, dp=4, ep=4)}, 10, False),
    "colocated": ({"images": Cut(dp=8), "language": Cut(tp=4, dp=2)}, 8, True),
    "alone": ({"language": Cut(dp=1)}, 1, True),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_member_lists_each_communicator_in_the_same_order(name: str, training: bool) -> None:
    modules, world_size, colocate = LAYOUTS[name]
    layout = MimoLayout.resolve(modules, world_size=world_size, colocate=colocate)
    found = {rank: communicators(layout, rank, training=training) for rank in range(world_size)}
    for rank, listed in found.items():
        assert list(listed) == sorted(set(listed))
        assert training or set(listed) <= set(communicators(layout, rank))
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
    assert [each.use for each in communicators(layout, 0, training=False)] == [
        "activations sent",
        "world",
        "activations sent",
    ]
    assert [each.use for each in communicators(layout, 2, training=False)] == ["world", "activations sent", "model"]


def test_bridge_is_needed_in_evaluation_where_encoders_have_more_replicas() -> None:
    for images, language, uses in ((Cut(dp=2), Cut(tp=2, dp=1), ["bridge"]), (Cut(tp=2), Cut(dp=2), [])):
        layout = MimoLayout.resolve({"images": images, "language": language}, world_size=2, colocate=True)
        made = communicators(layout, 0, training=False)
        assert [each.use for each in made if each.use == "bridge"] == uses


def test_largest_buffers_are_those_of_one_rank() -> None:
    layout = MimoLayout.resolve({"images": Cut(), "language": Cut(tp=2, dp=1)}, world_size=3)
    size, made = largest_buffers(layout, range(1, 3))
    assert made == communicators(layout, 1)
    assert size == sum(each.nbytes for each in made)


def test_bytes_depend_on_the_number_of_ranks_only() -> None:
    two, three = ((Communicator(ranks=tuple(range(n)), module="", use="world")).nbytes for n in (2, 3))
    assert 2**29 <= two < three < 2**30

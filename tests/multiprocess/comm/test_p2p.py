"""Edges between real ranks: nobody waits for a send, parts keep their order, and wrong shapes are named."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from lightning_mimo.comm.first_wait import OnFirstWait
from lightning_mimo.comm.p2p import DynamicShape, P2PLink, Receiver, Sender, Shapes
from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.layout.routes import Routes
from lightning_mimo.observe.spans import Spans
from tests.support.rank_pool import RankPool

LATE = 1.0  # seconds after which the other side receives


def link(routes: Routes, groups: list[dist.ProcessGroup], *, in_flight: int = 8) -> P2PLink:
    return P2PLink(
        kind="bridge",
        label="images -> language",
        module="images" if dist.get_rank() < 2 else "language",
        routes=routes,
        dtype=torch.float64,
        in_flight=in_flight,
        gradients_in_flight=in_flight,
        forward_group=groups[0],
        backward_group=groups[1],
        announcement_group=groups[2] if len(groups) > 2 else None,
        spans=Spans(),
        on_first_wait=OnFirstWait(),
    )


def fan_in() -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
    """Ranks 0 and 1 encode, rank 2 has their rows; seconds that sending took, activations and gradients received."""
    groups = [dist.new_group(), dist.new_group()]
    rows = [(2, 0), (0, 0), (1, 3), (4, 1)]  # of the two senders, by microbatch
    whole: list[Shapes] = [[(first, 3), (second, 3)] for first, second in rows]
    rank = dist.get_rank()
    if rank == 2:
        inlet = Receiver(link(Routes(receives=(0, 1), sends=((0,), (1,))), groups), source="images", gradients=True)
        inlet.expect(whole, forward_only=False)
        time.sleep(LATE)
        got = [inlet.recv_forward() for _ in whole]
        for tensor in got:
            inlet.send_backward(tensor.detach() * 10)
        inlet.finish()
        assert all(tensor.requires_grad and tensor.is_leaf for tensor in got)
        return 0.0, [tensor.detach() for tensor in got], []
    outlet = Sender(link(Routes(receives=(2,), sends=((2,),)), groups), source="images", gradients=True)
    outlet.expect([[shapes[rank]] for shapes in whole], forward_only=False)
    began = time.perf_counter()
    for microbatch, shapes in enumerate(whole):
        outlet.send_forward(torch.full(shapes[rank], 1.0 + microbatch + rank / 2, dtype=torch.float64))
    took = time.perf_counter() - began
    gradients = [outlet.recv_backward() for _ in whole]
    outlet.finish()
    return took, [], gradients


def test_senders_go_on_and_every_sample_keeps_its_rows(rank_pool: RankPool) -> None:
    (first, _, gradients), (second, _, others), (_, activations, _) = rank_pool.run(call_on_cpu, "fan_in", world_size=3)
    assert max(first, second) < LATE / 2
    expected = [[1.0, 1.0], [], [3.0, 3.5, 3.5, 3.5], [4.0, 4.0, 4.0, 4.0, 4.5]]
    assert [tensor[:, 0].tolist() for tensor in activations] == expected
    assert [tensor[:, 2].tolist() for tensor in gradients] == [[10.0, 10.0], [], [30.0], [40.0] * 4]
    assert [tensor[:, 1].tolist() for tensor in others] == [[], [], [35.0] * 3, [45.0]]


def one_way() -> tuple[float, list[tuple[list[int], tuple[int, ...]]]]:
    """Shapes that the receiver cannot know, with two numbers, two under way at most, and no gradients."""
    groups = [dist.new_group(), dist.new_group(), dist.new_group()]
    shapes = [(2, 1, 3), (0, 3, 1), (1, 2, 3), (5, 1, 2)]
    if dist.get_rank() == 1:
        inlet = Receiver(link(Routes(receives=(0,), sends=((0,),)), groups), source="images", gradients=False)
        inlet.expect([DynamicShape(numbers=2)] * len(shapes), forward_only=False)
        time.sleep(LATE)
        got = [(list(inlet.recv_forward().shape), inlet.told) for _ in shapes]
        inlet.send_backward(torch.ones(1))
        inlet.finish()
        return 0.0, got
    outlet = Sender(link(Routes(receives=(1,), sends=((1,),)), groups, in_flight=2), source="images", gradients=False)
    outlet.expect([DynamicShape(numbers=2)] * len(shapes), forward_only=False)
    began = time.perf_counter()
    for microbatch, shape in enumerate(shapes):
        outlet.tell((microbatch, 7))
        outlet.send_forward(torch.zeros(shape, dtype=torch.float64))
    took = time.perf_counter() - began
    assert outlet.recv_backward() is None
    outlet.finish()
    return took, []


def test_without_gradients_a_sender_runs_ahead_up_to_its_bound(rank_pool: RankPool) -> None:
    (took, _), (_, shapes) = rank_pool.run(call_on_cpu, "one_way", world_size=2)
    assert shapes == [([2, 1, 3], (0, 7)), ([0, 3, 1], (1, 7)), ([1, 2, 3], (2, 7)), ([5, 1, 2], (3, 7))]
    assert took > LATE / 2, "the third had to wait for the first"


def wrong_shape() -> str:
    groups = [dist.new_group(), dist.new_group()]
    outlet = Sender(link(Routes(receives=(0,), sends=((0,),)), groups), source="images", gradients=True)
    outlet.expect([[(2, 3)]], forward_only=True)
    with pytest.raises(ValueError, match="images -> language") as error:
        outlet.send_forward(torch.zeros(4, 3))
    return str(error.value)


def test_what_the_other_side_does_not_expect_is_refused(rank_pool: RankPool) -> None:
    (message,) = rank_pool.run(call_on_cpu, "wrong_shape", world_size=1)
    assert "the tensor sent by module 'images' has shape (4, 3), but the other side expects (2, 3)" in message


def call_on_cpu(name: str) -> object:
    with megatron_on_cpu():
        return {"fan_in": fan_in, "one_way": one_way, "wrong_shape": wrong_shape}[name]()

"""Makes the communicators of a rank before the first step.

NCCL makes a communicator when a process group is first used: in the first step, in an order that follows the schedule,
while other ranks may already wait in another one, and taking memory that activations have left. torch says on stderr,
once for sends and once for receives, that one of two ranks is made; afterwards it has no reason to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from lightning_mimo.layout.communicators import SENT, Communicator
from lightning_mimo.observe.spans import SpanInfo
from lightning_mimo.parallel.infra import MimoModelInfra


def make_communicators(infra: MimoModelInfra, needed: Sequence[Communicator]) -> None:
    """Use each communicator once. Collective over the world.

    Args:
        infra: process groups.
        needed: those of :func:`lightning_mimo.layout.communicators.communicators` for this rank, in its order.
    """
    rank = dist.get_rank()
    for each in needed:
        group = infra.group_of(each)
        number = torch.zeros(1, device=torch.cuda.current_device())
        others = tuple(other for other in each.ranks if other != rank)
        with infra.spans.span(_info(each, others)):
            if each.use not in SENT:
                dist.all_reduce(number, group=group)
                continue
            # With one tensor in flight between two ranks, as in training: several at a time would make another one.
            start = dist.isend if rank < others[0] else dist.irecv
            work = start(number, others[0], group=group)
            assert work is not None, "this rank is in the group"
            work.wait()


def _info(communicator: Communicator, others: tuple[int, ...]) -> SpanInfo:
    what = f"{communicator.use} of {communicator.module}" if communicator.module else communicator.use
    return SpanInfo(
        kind="world",
        label=f"make the communicator for {what}",
        module=communicator.module,
        peers=others,
    )

"""Clock synchronization between machines, accurate enough to draw all ranks on one time axis."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

_ROUNDS = 20


def offset_to_rank_0(
    device: torch.device, *, clock: Callable[[], float] = time.perf_counter, machine: str | None = None
) -> float:
    """Measure the offset to add to this rank's clock to get the time of rank 0. Collective over the world.

    Processes on the same machine share a monotonic clock, so ranks on the machine of rank 0 have offset 0. On every
    other machine, one rank exchanges messages with rank 0, which answers with its time. The exchange with the shortest
    round trip is used, assuming that rank 0 read its clock halfway through; the error is at most half the round trip.

    Args:
        device: device of the messages.
        clock: returns the time of this rank in seconds.
        machine: identifies this rank's machine; ``None`` detects it.

    Returns:
        Offset in seconds.
    """
    machines: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(machines, machine or _machine())
    offsets = {machines[0]: 0.0}
    for rank, name in enumerate(machines):
        if name not in offsets:
            offsets[name] = 0.0
            if dist.get_rank() == 0:
                _answer(rank, device, clock)
            elif dist.get_rank() == rank:
                offsets[name] = _ask(device, clock)
    everywhere = [0.0] * dist.get_world_size()
    dist.all_gather_object(everywhere, offsets[machines[dist.get_rank()]])
    return everywhere[machines.index(machines[dist.get_rank()])]


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.is_file() else socket.gethostname()


def _ask(device: torch.device, clock: Callable[[], float]) -> float:
    message = torch.zeros(1, dtype=torch.float64, device=device)
    tries = []
    for _ in range(_ROUNDS):
        asked = clock()
        dist.send(message, dst=0)
        dist.recv(message, src=0)
        answer = message.item()
        answered = clock()
        tries.append((answered - asked, answer - (asked + answered) / 2))
    return min(tries)[1]


def _answer(rank: int, device: torch.device, clock: Callable[[], float]) -> None:
    message = torch.zeros(1, dtype=torch.float64, device=device)
    for _ in range(_ROUNDS):
        dist.recv(message, src=rank)
        message.fill_(clock() + 0 * message.item())  # makes a GPU read the message before it sends
        dist.send(message, dst=rank)

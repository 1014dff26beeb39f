"""Where an epoch ends: on all ranks where the stream of the first one does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from lightning_mimo.observe.spans import SpanInfo, Spans

_AGREE = SpanInfo(kind="world", label="learn whether the streams of all ranks have another batch")
_GOES_ON = -1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What all ranks have said of their streams.

    Attributes:
        first_to_end: the first rank whose stream has ended; ``None`` if there is none.
        others_go_on: whether the stream of another rank has not ended.
    """

    first_to_end: int | None
    others_go_on: bool


class EndOfStream:
    """Tells all ranks whether any stream has ended.

    A rank says so when it has loaded a batch, and asks before it begins the next: the all-reduce of two numbers runs
    beside the step in between, in a group of its own, so that no rank waits for it. Calls are made at the same places
    of the program on every rank; none of them may depend on who waits for whom.
    """

    def __init__(self, spans: Spans) -> None:
        """
        Args:
            spans: records what this rank waits for.
        """
        self._spans = spans
        self._group: dist.ProcessGroup | None = None
        self._said: tuple[torch.Tensor, dist.Work | None] | None = None

    def set_up(self) -> None:
        """Create the group, once. Collective over the world."""
        if self._group is None and dist.is_initialized() and dist.get_world_size() > 1:
            group = dist.new_group(backend="gloo")  # numbers of the host, whatever the device
            assert isinstance(group, dist.ProcessGroup), "every rank is a member"
            self._group = group

    def say(self, *, ended: bool) -> None:
        """Say whether this rank's stream has ended. Collective over the world, does not wait."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if self._group is not None else (0, 1)
        numbers = torch.tensor([rank if ended else ranks, 0 if ended else _GOES_ON])
        work = None
        if self._group is not None:
            work = dist.all_reduce(numbers, op=dist.ReduceOp.MIN, group=self._group, async_op=True)
        self._said = numbers, work

    def ask(self) -> Outcome:
        """Wait for what all ranks have said last. Collective over the world."""
        assert self._said is not None, "say() comes first"
        (numbers, work), self._said = self._said, None
        if work is not None:
            with self._spans.span(_AGREE):
                work.wait()
        first, ended_or_not = numbers.tolist()
        ranks = 1 if self._group is None else dist.get_world_size()
        return Outcome(first_to_end=first if first < ranks else None, others_go_on=ended_or_not == _GOES_ON)

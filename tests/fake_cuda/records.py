"""What one rank has done on its fake GPU, in plain values that can be passed between processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

ALL_RANKS = "all ranks"
"""Name of the default process group."""

Kind = Literal["host read", "copy to the device", "device", "dtype"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a rank on a GPU should do rarely or never.

    Attributes:
        kind: what the rule is about.
        phase: ``setup``, ``first step``, ``step 1``, ``validation``, ….
        what: the operation, with shape and dtype of its tensor.
        where: ``file:line function < file:line function``, innermost first.
    """

    kind: Kind
    phase: str
    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.phase}: {self.kind}: {self.what} at {self.where}"


@dataclass(frozen=True, kw_only=True)
class Message:
    """One communication of a rank, in the order in which it was issued.

    Attributes:
        rank: global rank that issues it.
        operation: ``send``, ``recv_``, or a collective.
        group: name of the process group, the same on all ranks.
        members: global ranks of the group.
        source: global rank that sends, or the root of a collective; ``None`` if there is none.
        destination: global rank that receives a ``send``.
        tag: on CPU tensors, which gloo matches by their tags; ``None`` on a GPU.
        size: bytes; 0 where ranks exchange unequal parts.
        sends: of an exchange of all with all, rows for each member.
        receives: of an exchange of all with all, rows from each member.
        dtype: of the tensors; empty for objects.
        of_hosts: whether hosts exchange it, over gloo.
        waits: whether what the rank issues next has to wait until this is complete.
        phase: as for Event.
        where: as for Event.
    """

    rank: int
    operation: str
    group: str
    members: tuple[int, ...]
    source: int | None = None
    destination: int | None = None
    tag: int | None = None
    size: int
    sends: tuple[int, ...] = ()
    receives: tuple[int, ...] = ()
    dtype: str
    of_hosts: bool = False
    waits: bool
    phase: str
    where: str

    @property
    def is_p2p(self) -> bool:
        return self.operation in ("send", "recv_")

    def fits(self, other: Message) -> bool:
        """Whether two ranks can execute their messages with each other."""
        if (self.source, self.size, self.dtype) != (other.source, other.size, other.dtype):
            return False
        if self.is_p2p:
            return self.destination == other.destination and self.operation != other.operation
        mine, theirs = self.members.index(self.rank), self.members.index(other.rank)
        exchange = not self.sends or (
            self.sends[theirs] == other.receives[mine] and other.sends[mine] == self.receives[theirs]
        )
        return self.operation == other.operation and exchange

    def __str__(self) -> str:
        peer = f" from rank {self.source}" if self.operation == "recv_" else ""
        peer = f" to rank {self.destination}" if self.operation == "send" else peer
        return f"{self.operation.strip('_')}{peer} of {self.size} bytes {self.dtype} at {self.where} ({self.phase})"


@dataclass(kw_only=True)
class RankRecord:
    """Everything that a rank has done.

    Attributes:
        rank: global rank.
        events: in the order of execution.
        messages: in the order of issue.
        groups: members of every process group, in the order of creation.
        memory: bytes of live tensors at the end of each step.
        grown: place of allocation -> bytes by which its live tensors have grown between the last two steps.
        misplaced: parameters, gradients and optimizer state on a wrong device or of a wrong dtype.
        results: what the Trainer's stages returned, as far as tests look at it.
        error: traceback of an exception; empty if there was none.
    """

    rank: int
    events: Sequence[Event] = ()
    messages: Sequence[Message] = ()
    groups: Sequence[tuple[int, ...]] = ()
    memory: Sequence[int] = ()
    grown: Mapping[str, int] = field(default_factory=dict)
    misplaced: Sequence[str] = ()
    results: Mapping[str, object] = field(default_factory=dict)
    error: str = ""

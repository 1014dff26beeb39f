"""Whether the messages of all ranks match: what one sends the others receive, in the same order, and nobody waits
for ever.

The model is NCCL's. Every process group has a communicator for its collectives, and another one for each pair of ranks
that sends or receives; tags mean nothing. Hosts exchange CPU tensors over gloo, which has a channel for each direction
and tag. On a communicator messages are executed one after the other, in the order in which a rank issues them. What a
rank waits for holds up everything that it issues later, on any communicator.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from tests.fake_cuda.records import Message, RankRecord

_MAKER = "lightning_mimo/parallel/communicators.py"
"""Where communicators are made, before the first batch."""

Communicator = tuple[str, tuple[int, ...]]
"""Name of the process group, and the ranks that it connects."""


def problems_of(records: Sequence[RankRecord]) -> list[str]:
    """Why the messages of all ranks of a world do not match; empty if they do."""
    by_rank = {record.rank: record for record in records}
    problems = list(_different_groups(records))
    for communicator, queues in sorted(_by_communicator(by_rank).items()):
        problems += _differences(communicator, queues)
    return problems or list(_deadlock({rank: record.messages for rank, record in by_rank.items()}))


def late_communicators(records: Sequence[RankRecord]) -> list[str]:
    """First uses of communicators that are not among those made before the first batch.

    If NCCL has no communicator to make later, torch has no reason to say that an unbatched send or receive makes one.
    """
    found = []
    for record in records:
        made: set[Communicator] = set()
        late: dict[Communicator, Message] = {}
        for message in record.messages:
            communicator = _communicator(message)
            if message.where.startswith(_MAKER):
                made.add(communicator)
            elif len(communicator[1]) > 1 and not message.of_hosts:
                late.setdefault(communicator, message)
        found += [f"rank {record.rank}: {each}" for name, each in late.items() if name not in made]
    return found


def _different_groups(records: Sequence[RankRecord]) -> Iterator[str]:
    first = records[0]
    for other in records[1:]:
        if list(other.groups) != list(first.groups):
            pairs = enumerate(zip_longest(first.groups, other.groups))
            number, (a, b) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            yield (
                f"process group {number} has the ranks {a} on rank {first.rank}, but {b} on rank {other.rank}: all "
                f"ranks must create the same groups in the same order"
            )


def _communicator(message: Message) -> Communicator:
    if message.is_p2p:
        assert message.source is not None and message.destination is not None
        name = message.group
        if message.tag is not None:
            name = f"{name}, tag {message.tag} from rank {message.source}"
        return name, tuple(sorted((message.source, message.destination)))
    return f"{message.group}, collectives", message.members


def _by_communicator(records: Mapping[int, RankRecord]) -> dict[Communicator, dict[int, list[Message]]]:
    """Communicator -> rank -> its messages there, in order."""
    found: dict[Communicator, dict[int, list[Message]]] = {}
    for rank, record in records.items():
        for message in record.messages:
            communicator = _communicator(message)
            queues = found.setdefault(communicator, {member: [] for member in communicator[1]})
            queues[rank].append(message)
    return found


def _differences(communicator: Communicator, queues: Mapping[int, Sequence[Message]]) -> Iterator[str]:
    """The first place at which the ranks of a communicator do not agree."""
    name, _ = communicator
    (first, expected), *others = queues.items()
    for rank, found in others:
        for number, (a, b) in enumerate(zip_longest(expected, found)):
            if a is None or b is None or not a.fits(b):
                yield f"message {number} of group {name}: rank {first}: {_said(a)}; rank {rank}: {_said(b)}"
                break


def _said(message: Message | None) -> str:
    return "nothing more" if message is None else str(message)


def _deadlock(programs: Mapping[int, Sequence[Message]]) -> Iterator[str]:
    """Execute all messages, and say what each rank is stuck at if not all can be.

    Requires that the messages of every communicator fit.
    """
    queues: dict[Communicator, dict[int, deque[Message]]] = defaultdict(lambda: defaultdict(deque))
    waiting: dict[int, Message] = {}
    following = dict.fromkeys(programs, 0)
    while True:
        issued = [rank for rank in programs if _issue(rank, programs[rank], following, queues, waiting)]
        done = [communicator for communicator in queues if _execute(communicator, queues[communicator], waiting)]
        if not issued and not done:
            break
    left = {rank: queue[0] for by_rank in queues.values() for rank, queue in by_rank.items() if queue}
    stuck = left | waiting
    if stuck:
        yield "deadlock: " + "; ".join(f"rank {rank} waits in {message}" for rank, message in sorted(stuck.items()))


def _issue(
    rank: int,
    program: Sequence[Message],
    following: dict[int, int],
    queues: Mapping[Communicator, Mapping[int, deque[Message]]],
    waiting: dict[int, Message],
) -> bool:
    """Issue the messages of a rank up to the first that it waits for. Returns whether there were any."""
    before = following[rank]
    while rank not in waiting and following[rank] < len(program):
        message = program[following[rank]]
        following[rank] += 1
        queues[_communicator(message)][rank].append(message)
        if message.waits:
            waiting[rank] = message
    return following[rank] > before


def _execute(communicator: Communicator, queues: Mapping[int, deque[Message]], waiting: dict[int, Message]) -> bool:
    """Execute the messages that all ranks of a communicator have come to. Returns whether there were any."""
    _, members = communicator
    executed = False
    while all(queues[member] for member in members):
        heads = [queues[member][0] for member in members]
        if not all(heads[0].fits(other) for other in heads[1:]):
            break
        for member in members:
            message = queues[member].popleft()
            if waiting.get(member) is message:
                del waiting[member]
        executed = True
    return executed

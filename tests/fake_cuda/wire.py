"""torch.distributed on a fake GPU: nothing is sent but what the host needs to know, and every message is recorded."""

from __future__ import annotations

import contextlib
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor

from tests.fake_cuda.places import where
from tests.fake_cuda.recorder import Recorder, is_known, known, set_known, tensors_of
from tests.fake_cuda.records import ALL_RANKS, Message

_FEW = 4096  # elements


class Wire:
    """Executes the operations of ``torch.ops.c10d`` and the collectives of Python objects on one rank.

    Attributes:
        sends_wait: whether sends hold up what this rank issues after them.
        host_groups: names of the groups that exchange CPU tensors.
    """

    def __init__(
        self, recorder: Recorder, messages: list[Message], store: dist.Store, rank: int, world_size: int
    ) -> None:
        """
        Args:
            recorder: of this rank.
            messages: gets what this rank issues.
            store: connects all ranks.
            rank: global rank.
            world_size: number of ranks.
        """
        self.sends_wait = False
        self.host_groups: set[str] = set()
        self._recorder = recorder
        self._messages = messages
        self._store = dist.PrefixStore("fake_cuda", store)
        self._rank = rank
        self._world = tuple(range(world_size))
        self._numbers: Counter[str] = Counter()
        recorder.communicate = self._communicate

    def exchange(self, value: Any, group: str, members: Sequence[int]) -> list[Any]:
        """Values of all members of a group, in their order. Collective over the group, and waits for all."""
        number = self._next(f"exchange/{group}")
        prefix = f"exchange/{group}/{number}"
        self._store.set(f"{prefix}/{self._rank}", pickle.dumps(value))
        return [pickle.loads(self._store.get(f"{prefix}/{member}")) for member in members]

    def leave(self) -> None:
        """End the connection. Rank 0, which has the store, does so last."""
        if self._rank:
            self._store.set(f"left/{self._rank}", "")
        else:
            self._store.wait([f"left/{rank}" for rank in self._world[1:]])

    def note_objects(self, operation: str, group: dist.ProcessGroup | None, root: int | None) -> None:
        """Record a collective of Python objects, which waits for all members."""
        name, members = self.identify(group)
        self._messages.append(self._message(operation, name, members, [], source=root, waits=True))

    def identify(self, group: dist.ProcessGroup | None) -> tuple[str, tuple[int, ...]]:
        """Name of a group, the same on all ranks, and its global ranks."""
        if group is None or group is dist.group.WORLD:
            return ALL_RANKS, self._world
        return group.group_name, tuple(dist.get_process_group_ranks(group))

    def _communicate(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operation = func._overloadpacket.__name__
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        name, members = self.identify(dist.ProcessGroup.unbox(given["process_group"]))
        tensors = [] if operation == "barrier" else list(tensors_of((args, kwargs)))
        message = self._message(operation, name, members, tensors, **self._ends(operation, given, name, members))
        self._messages.append(message)
        for each in tensors:
            if each.device.type != ("cpu" if name in self.host_groups else "cuda"):
                self._recorder.note("device", f"{operation.strip('_')} of a tensor on the {each.device.type}")
        if operation == "barrier":
            self.exchange(None, name, members)
        elif tensors and tensors[0].dtype in (torch.int64, torch.int32) and tensors[0].numel() <= _FEW:
            self._pass_on(message, tensors)
        work = FakeWork().boxed()
        return (args[0], work) if len(func._schema.returns) > 1 else work

    def _ends(self, operation: str, given: dict[str, Any], group: str, members: Sequence[int]) -> dict[str, Any]:
        """Fields of a message that say who communicates with whom, and who waits."""
        if operation == "send":
            ends = {"source": self._rank, "destination": members[given["dst"]], "waits": self.sends_wait}
        elif operation == "recv_":
            ends = {"source": members[given["src"]], "destination": self._rank, "waits": True}
        else:
            root = given.get("root_rank")
            return {
                "source": None if root is None else members[root],
                "waits": not given.get("async_op", True),
                "sends": tuple(given.get("input_split_sizes") or ()),
                "receives": tuple(given.get("output_split_sizes") or ()),
            }
        return ends | {"tag": given["tag"] if group in self.host_groups else None}

    def _pass_on(self, message: Message, tensors: Sequence[torch.Tensor]) -> None:
        """Let integers arrive that the host may read: those that stages announce, and flags of all ranks."""
        tensor = tensors[0]
        channel = f"p2p/{message.group}/{message.source}/{message.destination}/{message.tag}"
        if message.operation == "send":
            self._store.set(f"{channel}/{self._next(channel)}", pickle.dumps(known(tensor)))
        elif message.operation == "recv_":
            received = pickle.loads(self._store.get(f"{channel}/{self._next(channel)}"))
            if isinstance(tensor, FakeTensor):
                set_known(tensor, received)
            else:
                tensor.copy_(received)
        elif message.operation in ("allreduce_", "_allgather_base_"):
            own = tensors[-1]
            everywhere = self.exchange(known(own) if is_known(own) else None, message.group, message.members)
            if all(each is not None for each in everywhere):
                # Flags and indices are reduced by their maximum everywhere.
                is_reduced = message.operation == "allreduce_"
                set_known(tensor, torch.stack(everywhere).amax(dim=0) if is_reduced else torch.cat(everywhere))

    def _next(self, key: str) -> int:
        self._numbers[key] += 1
        return self._numbers[key]

    def _message(
        self, operation: str, group: str, members: Sequence[int], tensors: Sequence[torch.Tensor], **ends: Any
    ) -> Message:
        is_uneven = bool(ends.get("sends"))
        return Message(
            rank=self._rank,
            operation=operation,
            group=group,
            members=tuple(members),
            size=0 if is_uneven else sum(each.nbytes for each in tensors),
            of_hosts=group in self.host_groups,
            dtype=" ".join(sorted({str(each.dtype).removeprefix("torch.") for each in tensors})),
            phase=self._recorder.phase,
            where=where(),
            **ends,
        )


@contextlib.contextmanager
def sends_that_wait(wire: Wire) -> Iterator[None]:
    """Sends in this context hold up what this rank issues after them."""
    wire.sends_wait = True
    try:
        yield
    finally:
        wire.sends_wait = False

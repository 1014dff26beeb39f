"""Lets a process be one rank of a world of fake GPUs. What is replaced, and why, stands here and nowhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend
from torch._subclasses.fake_tensor import FakeTensor

from tests.fake_cuda.places import where
from tests.fake_cuda.recorder import Recorder
from tests.fake_cuda.records import Message
from tests.fake_cuda.wire import Wire, sends_that_wait


class FakeRank:
    """One rank of a world.

    Attributes:
        recorder: of its operations.
        messages: what it has issued to other ranks, in order.
        groups: members of the process groups, in the order of their creation.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.recorder = Recorder(torch.device("cuda", rank))
        self.messages: list[Message] = []
        self.groups: list[tuple[int, ...]] = []
        self._wire: Wire | None = None

    @property
    def wire(self) -> Wire:
        """What connects the ranks, from the creation of the default process group on."""
        assert self._wire is not None, "there is no process group yet"
        return self._wire

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Be this rank within the context, in a process that has been no other rank before."""
        assert torch.cuda.is_available(), "the stubs of CUDA must be preloaded"
        with contextlib.ExitStack() as stack:
            replace = _Replacer(stack)
            self._replace_process_groups(replace)
            self._replace_object_collectives(replace)
            self._replace_host_waits(replace)
            replace(torch.nn.Module, "_apply", _apply)
            # torch.tensor(..., device="cuda") makes a tensor on the CPU and copies it, which the recorder sees.
            stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
            torch._C._set_only_lift_cpu_tensors(True)
            stack.enter_context(self.recorder)
            yield

    def _replace_process_groups(self, replace: _Replacer) -> None:
        """NCCL, which the stubs do not bring, by groups that send nothing. Callers still see NCCL."""

        def init_process_group(backend: str | None = None, *args: Any, original: Any, **options: Any) -> None:
            assert backend == "nccl", f"on a GPU the backend is NCCL, not {backend}"
            options.pop("pg_options", None)
            options.pop("device_id", None)
            original("cuda:fake", *args, **options)
            store = dist.distributed_c10d._get_default_store()
            self._wire = Wire(self.recorder, self.messages, store.clone(), self.rank, self.world_size)

        def new_group(ranks: Any = None, *args: Any, original: Any, **options: Any) -> Any:
            is_of_hosts = options.get("backend") == "gloo"
            assert is_of_hosts or options.get("backend") in (None, "nccl"), "a group is NCCL's, or of hosts"
            self.groups.append(tuple(range(self.world_size) if ranks is None else ranks))
            backend = "cpu:fake" if is_of_hosts else "cuda:fake"
            group = original(ranks, *args, **{**options, "backend": backend, "pg_options": None})
            if is_of_hosts and isinstance(group, dist.ProcessGroup):
                self.wire.host_groups.add(group.group_name)
            return group

        def get_backend(group: Any = None, *, original: Any) -> str:
            return {"cuda:fake": "nccl", "cpu:fake": "gloo"}[original(group)]

        def send(*args: Any, original: Any, **options: Any) -> Any:
            with sends_that_wait(self.wire):
                return original(*args, **options)

        for module in (dist, dist.distributed_c10d):
            replace(module, "init_process_group", init_process_group)
            replace(module, "new_group", new_group)
            replace(module, "get_backend", get_backend)
            replace(module, "send", send)

    def _replace_object_collectives(self, replace: _Replacer) -> None:
        """Collectives of Python objects go through the store: what they carry decides what ranks do next."""

        def broadcast(objects: list[Any], src: int = 0, group: Any = None, *_: Any, original: Any, **__: Any) -> None:
            self.wire.note_objects("broadcast_object_list", group, src)
            name, members = self.wire.identify(group)
            objects[:] = self.wire.exchange(list(objects), name, members)[members.index(src)]

        def all_gather(everywhere: list[Any], own: Any, group: Any = None, *, original: Any) -> None:
            self.wire.note_objects("all_gather_object", group, None)
            everywhere[:] = self.wire.exchange(own, *self.wire.identify(group))

        def gather(own: Any, everywhere: Any = None, dst: int = 0, group: Any = None, *, original: Any) -> None:
            self.wire.note_objects("gather_object", group, dst)
            gathered = self.wire.exchange(own, *self.wire.identify(group))
            if everywhere is not None:
                everywhere[:] = gathered

        replace(dist, "broadcast_object_list", broadcast)
        replace(dist, "all_gather_object", all_gather)
        replace(dist, "gather_object", gather)

    def _replace_host_waits(self, replace: _Replacer) -> None:
        """Waits of the host that are no operations on tensors."""

        def tolist(tensor: FakeTensor, *, original: Any) -> Any:
            return self.recorder.read(tensor, "tolist()").tolist()

        def waiting(label: str) -> Callable[..., Any]:
            def wait(*args: Any, original: Any, **options: Any) -> Any:
                self.recorder.note("host read", label)
                return original(*args, **options)

            return wait

        def record(event: torch.cuda.Event, *args: Any, original: Any) -> None:
            reads = -1 if self.recorder.is_idle else self.recorder.reads
            event.recorded_at = reads, where()  # type: ignore[attr-defined]
            original(event, *args)

        def synchronize(event: torch.cuda.Event, *, original: Any) -> None:
            # The device has passed what was recorded before the last read, or while it had nothing to do.
            reads, place = getattr(event, "recorded_at", (-1, ""))
            if reads == self.recorder.reads:
                self.recorder.note("host read", f"Event.synchronize() of an event recorded at {place}")
            original(event)

        replace(FakeTensor, "tolist", tolist)
        replace(torch.cuda, "synchronize", waiting("torch.cuda.synchronize()"))
        replace(torch.cuda.Event, "record", record)
        replace(torch.cuda.Event, "synchronize", synchronize)
        replace(torch.cuda.Stream, "synchronize", waiting("Stream.synchronize()"))


class _Replacer:
    """Replaces attributes until a stack is closed."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack

    def __call__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Replace ``owner.name`` by a function that is given what it replaces as ``original``."""
        original = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            return function(*args, original=original, **options)

        setattr(owner, name, call)
        self._stack.callback(setattr, owner, name, original)


def _apply(module: torch.nn.Module, function: Any, recurse: bool = True, *, original: Any) -> torch.nn.Module:
    """Move or convert a module. torch changes the data of a parameter in place, which a fake tensor does not allow:
    a new parameter takes its place, with its attributes."""
    # All modules of one call share the function, and so may tied parameters what takes their place.
    moved: dict[int, tuple[torch.nn.Parameter, torch.nn.Parameter]] = vars(function).setdefault("moved", {})
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            if id(parameter) not in moved:
                moved[id(parameter)] = parameter, _moved(parameter, function)
            module._parameters[name] = moved[id(parameter)][1]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _moved(parameter: torch.nn.Parameter, function: Any) -> torch.nn.Parameter:
    with torch.no_grad():
        data = function(parameter)
    if data.dtype == parameter.dtype and data.device == parameter.device:
        return parameter
    result = torch.nn.Parameter(data, parameter.requires_grad)
    for name, value in vars(parameter).items():
        if name not in vars(result):
            setattr(result, name, value)
    return result

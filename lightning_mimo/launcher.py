"""Starts the other ranks of this node by forking, so that imports are paid for once, not once per rank.

Lightning's own launcher starts the script again in every process. On a CPU, where nothing stands against a fork,
that only repeats half a minute of imports. As there, each process then runs the rest of the script.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_mimo.cluster import check_ranks, first_rank_speaks, name_options
from lightning_mimo.parallelism import LayoutError

# How long a rank that lost its fellows may take to report an error of its own.
_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.2
# How long a rank that ends because of another one waits for that one to be named.
_NAMING_SECONDS = 1.0
# How long the others may take to clean up after all went well.
_EXIT_SECONDS = 60.0


def can_fork(root_device: torch.device) -> bool:
    """Whether ranks may be forked: on Linux, without CUDA (a forked process cannot use its parent's CUDA context)."""
    return sys.platform == "linux" and root_device.type == "cpu"


class ScriptLauncher(_SubprocessScriptLauncher):
    """Lightning's, which starts the script again for each further GPU, but not before the layout is known to fit."""

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        *,
        num_processes: int,
        num_nodes: int,
        validate: Callable[[Any], object],
    ) -> None:
        """Arguments as for :class:`ForkLauncher`."""
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._validate = validate

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other ranks of this node, and call ``function`` in each."""
        self._validate(trainer)
        return super().launch(function, *args, trainer=trainer, **kwargs)


class ForkLauncher(_Launcher):
    """Forks one process per further rank of this node, and ends all of them when one fails."""

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        *,
        num_processes: int,
        num_nodes: int,
        validate: Callable[[Any], object],
    ) -> None:
        """
        Args:
            cluster_environment: tells rank and address; told the local rank through ``LOCAL_RANK``, as by Lightning.
            num_processes: ranks on this node.
            num_nodes: nodes.
            validate: called with the Trainer before any process is started; raises if the run cannot work.
        """
        self._environment = cluster_environment
        self._num_processes = num_processes
        self._num_nodes = num_nodes
        self._validate = validate
        self._children: dict[int, int] = {}  # process -> rank on this node
        self._parent: int | None = None  # in a forked rank

    @property
    def is_interactive_compatible(self) -> bool:
        return False

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other ranks of this node, unless something else does, and call ``function`` in each."""
        environment = self._environment
        with first_rank_speaks(environment):
            check_ranks(environment, num_nodes=self._num_nodes, devices=self._num_processes)
            try:
                self._validate(trainer)
            except LayoutError as error:
                raise LayoutError(f"{error}{name_options(environment)}") from None
        environment.validate_settings(num_devices=self._num_processes, num_nodes=self._num_nodes)
        if not self._environment.creates_processes_externally:
            self._fork()
        _set_num_threads_if_needed(num_processes=self._num_processes)
        return function(*args, **kwargs)

    def kill(self, signum: signal.Signals | int) -> None:
        """Send a signal to the processes that this one started."""
        for child in self._children:
            _signal(child, signum)

    def kill_node(self) -> None:
        """Kill all of this node's ranks that this one started or was started by: also one that stands still."""
        self.kill(signal.SIGKILL)
        if self._parent is not None and os.getppid() == self._parent:
            _signal(self._parent, signal.SIGKILL)

    def _fork(self) -> None:
        os.environ["MASTER_ADDR"] = self._environment.main_address
        os.environ["MASTER_PORT"] = str(self._environment.main_port)
        os.environ["NODE_RANK"] = str(self._environment.node_rank())
        os.environ["WORLD_SIZE"] = str(self._num_processes * self._num_nodes)
        os.environ["LOCAL_RANK"] = "0"
        # Keep the collector off what was imported, or every rank would copy all of it, page by page.
        gc.collect()
        gc.freeze()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        for local_rank in range(1, self._num_processes):
            with warnings.catch_warnings():
                # Python warns where a library (OpenBLAS, say) has threads. They hold no lock that the child needs.
                warnings.filterwarnings("ignore", ".*use of fork.. may lead to deadlocks", DeprecationWarning)
                child = os.fork()
            if child == 0:
                os.environ["LOCAL_RANK"] = str(local_rank)
                self._children = {}
                self._parent = parent
                atexit.register(_leave_at_once)
                first = self._environment.node_rank() * self._num_processes
                rank_zero_only.rank = first + local_rank  # or this rank would repeat what rank 0 says
                threading.Thread(target=_end_with_parent, args=(parent, first), daemon=True).start()
                return
            self._children[child] = local_rank
        gc.unfreeze()
        threading.Thread(target=self._end_when_child_fails, daemon=True).start()
        atexit.register(self._wait_for_children)

    def _end_when_child_fails(self) -> None:
        """Watch the children; if one ends badly, give the others time to say why they stopped, then end all."""
        while self._children:
            if ended := self._ended_badly():
                # One that was killed may be seen to have ended after those that ended because of it.
                time.sleep(_POLL_SECONDS)
                ended |= self._ended_badly()
                local_rank, child, code = min(ended, key=lambda each: (each[2] > 0, each[0]))
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                rank = self._environment.node_rank() * self._num_processes + local_rank
                print(f"Rank {rank} (process {child}) {how}; ending the others.", file=sys.stderr, flush=True)
                time.sleep(_GRACE_SECONDS)
                self.kill(signal.SIGKILL)
                os._exit(code if code > 0 else 1)
            time.sleep(_POLL_SECONDS)

    def _ended_badly(self) -> set[tuple[int, int, int]]:
        """Take leave of the children that have ended: (local rank, process, exit code or minus the signal) if badly."""
        ended = set()
        for child in tuple(self._children):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                local_rank = self._children.pop(child)
                if status != 0:
                    ended.add((local_rank, child, os.waitstatus_to_exitcode(status)))
        return ended

    def _wait_for_children(self) -> None:
        # After an error here the others wait for this rank in some collective: they have nothing to add. But the error
        # may come of one that was killed, and that one is named by the thread that watches.
        deadline = time.monotonic() + (_NAMING_SECONDS if _failed() else _EXIT_SECONDS)
        while self._children and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        self.kill(signal.SIGKILL)


def _leave_at_once() -> None:
    """In a forked rank, after its own clean-up: skip the interpreter's, which would copy and free every import."""
    if _failed():
        time.sleep(_NAMING_SECONDS)  # for the thread that watches the first rank
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if _failed() else 0)


def _failed() -> bool:
    """Whether this process is ending because of an exception that nobody caught."""
    return getattr(sys, "last_exc", None) is not None


def _end_with_parent(parent: int, rank: int) -> None:
    """In a forked rank: end when the process that started it, the first rank of this node, is gone."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    print(f"Rank {rank} (process {parent}) is gone; ending.", file=sys.stderr, flush=True)
    time.sleep(_GRACE_SECONDS)
    os._exit(1)


def _signal(pid: int, signum: signal.Signals | int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)

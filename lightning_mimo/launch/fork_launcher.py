"""Starts the other ranks of this node by forking, so that imports run once per node instead of once per rank.

Lightning's launcher starts the script again in every process. On CPUs, where a fork is safe, this only repeats half a
minute of imports. As with Lightning's launcher, each process runs the rest of the script, and the process that the user
started is the first rank. A supervisor process is the parent of the other ranks; it does not train, see
:mod:`lightning_mimo.launch.supervisor`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_mimo.errors import LayoutError
from lightning_mimo.launch.cluster import check_ranks, first_rank_speaks, name_options
from lightning_mimo.launch.node_rank import NodeRank, this_node_rank
from lightning_mimo.launch.rank_board import NodeBoard
from lightning_mimo.launch.script_launcher import ScriptLauncher
from lightning_mimo.launch.supervisor import Supervisor
from lightning_mimo.upstream.lightning import _Launcher, _set_num_threads_if_needed


def can_fork(root_device: torch.device) -> bool:
    """Whether ranks can be forked: on Linux and without CUDA, whose context a forked process cannot use."""
    return sys.platform == "linux" and root_device.type == "cpu"


def make_launcher(
    environment: ClusterEnvironment,
    devices: Sequence[torch.device],
    num_nodes: int,
    timeout: timedelta,
    validate: Callable[[Any], object],
) -> _Launcher:
    """The launcher of this node's ranks: a :class:`ForkLauncher` where ranks may be forked or are started elsewhere.

    Args:
        environment: Lightning's ClusterEnvironment.
        devices: of this node, one for each rank.
        num_nodes: nodes.
        timeout: how long a rank may work on after the first one has ended.
        validate: as for ForkLauncher. Lightning's own launcher, which starts the script anew, does without.
    """
    if environment.creates_processes_externally or can_fork(devices[0]):
        return ForkLauncher(
            environment,
            num_processes=len(devices),
            num_nodes=num_nodes,
            timeout=timeout.total_seconds(),
            validate=validate,
        )
    return ScriptLauncher(environment, num_processes=len(devices), num_nodes=num_nodes, validate=validate)


class ForkLauncher(_Launcher):
    """Forks a process for every rank of this node except the first, and ends all ranks when one fails."""

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        *,
        num_processes: int,
        num_nodes: int,
        timeout: float,
        validate: Callable[[Any], object],
    ) -> None:
        """
        Args:
            cluster_environment: source of rank and address. As in Lightning, ``LOCAL_RANK`` tells it the local rank.
            num_processes: number of ranks on this node.
            num_nodes: number of nodes.
            timeout: seconds that a rank may keep running after the first one has ended.
            validate: called with the Trainer before any process is started; raises if the run is invalid.
        """
        self._environment = cluster_environment
        self._num_processes = num_processes
        self._num_nodes = num_nodes
        self._timeout = timeout
        self._validate = validate
        self._children: list[int] = []  # processes that this one has started

    @property
    def is_interactive_compatible(self) -> bool:
        return False

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other ranks of this node, unless the cluster has started them, and call ``function`` in each."""
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
        node_rank = this_node_rank()
        with node_rank.inside_run() if node_rank is not None else contextlib.nullcontext():
            return function(*args, **kwargs)

    def kill(self, signum: signal.Signals | int) -> None:
        """Send a signal to the ranks that this process has started."""
        if self._children and (node_rank := this_node_rank()) is not None:
            node_rank.signal_others(signum)

    def kill_node(self) -> None:
        """Kill all ranks of this node if they were forked, including one that is stopped or hangs."""
        if (node_rank := this_node_rank()) is not None:
            node_rank.end_node()

    def _fork(self) -> None:
        os.environ["MASTER_ADDR"] = self._environment.main_address
        os.environ["MASTER_PORT"] = str(self._environment.main_port)
        os.environ["NODE_RANK"] = str(self._environment.node_rank())
        os.environ["WORLD_SIZE"] = str(self._num_processes * self._num_nodes)
        os.environ["LOCAL_RANK"] = "0"
        if self._num_processes == 1:
            return
        board = NodeBoard(self._num_processes)
        board.ranks[0].pid = first_process = os.getpid()
        # Exclude imported objects from garbage collection: touching them would copy their memory pages in every rank.
        gc.collect()
        gc.freeze()
        sys.stdout.flush()
        sys.stderr.flush()
        supervisor = _fork_process()
        if supervisor == 0:
            local_rank = self._fork_ranks(board, first_process)
            os.environ["LOCAL_RANK"] = str(local_rank)
            # Otherwise this rank would repeat the messages of rank 0.
            rank = self._environment.node_rank() * self._num_processes + local_rank
            rank_zero_only.rank = rank  # type: ignore[attr-defined]  # Lightning keeps it on the function
        else:
            gc.unfreeze()
            self._children = [supervisor]
            NodeRank.become(board, local_rank=0, supervisor=supervisor)

    def _fork_ranks(self, board: NodeBoard, first_process: int) -> int:
        """In the supervisor: fork the ranks. Returns only in the ranks, with the rank on this node."""
        supervisor = os.getpid()
        children: dict[int, int] = {}
        for local_rank in range(1, self._num_processes):
            child = _fork_process()
            if child == 0:
                board.ranks[local_rank].pid = os.getpid()
                NodeRank.become(board, local_rank=local_rank, supervisor=supervisor)
                return local_rank
            board.ranks[local_rank].pid = child
            children[child] = local_rank
        Supervisor(
            board,
            children=children,
            first_process=first_process,
            first_rank=self._environment.node_rank() * self._num_processes,
            timeout=self._timeout,
        ).run()
        os._exit(0)


def _fork_process() -> int:
    with warnings.catch_warnings():
        # Python warns if a library such as OpenBLAS has threads. They hold no lock that the child needs.
        warnings.filterwarnings("ignore", ".*use of fork.. may lead to deadlocks", DeprecationWarning)
        return os.fork()

"""Compares the ranks that a cluster has started with those that the Trainer expects, before any rank waits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from lightning_mimo.errors import ConfigError

# Time that the other ranks give the first rank to report an error that all ranks have, and to exit. On a loaded
# machine its exit alone has taken more than 20 seconds.
_LISTEN_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class _Started:
    """Ranks that a launcher has started.

    Attributes:
        by: name of the launcher.
        per_node: number of ranks on each node.
        how: the launcher's options for nodes and ranks per node, as a format string with a ``{}`` for each number.
    """

    by: str
    per_node: list[int]
    how: str

    def __str__(self) -> str:
        nodes = Counter(self.per_node)
        return f"{self.by} started {' and '.join(_ranks_on(n, ranks) for ranks, n in nodes.items())}"


class _Slurm(SLURMEnvironment):
    """Reads environment variables of Slurm that Lightning does not use."""

    def __init__(self) -> None:
        """Does not call Lightning's constructor, which raises errors and warns."""

    @property
    def is_task(self) -> bool:
        """Whether srun started this process. Slurm sets most of the same variables in the batch script itself."""
        return "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ

    @property
    def tasks_per_node(self) -> list[int]:
        """Tasks on each node of the job step, or of the job outside a step: ``2(x3),1`` is [2, 2, 2, 1]."""
        text = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", ""))
        found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
        return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]

    @property
    def knows_tasks_per_node(self) -> bool:
        """Whether Slurm sets the variable from which Lightning reads the tasks per node."""
        return self.world_size() == 1 or "SLURM_NTASKS_PER_NODE" in os.environ

    @property
    def job(self) -> str:
        """Job id in the form that scontrol expects. In an array job the plain number could mean all tasks."""
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        return os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


class _Torchrun(TorchElasticEnvironment):
    """Reads environment variables of torchrun that Lightning does not use."""

    @property
    def ranks_per_node(self) -> list[int]:
        return [int(os.environ["LOCAL_WORLD_SIZE"])] * int(os.environ["GROUP_WORLD_SIZE"])


class _ByHand(LightningEnvironment):
    """Reads the environment variables that a user sets to start one command by hand on each node."""

    @property
    def missing(self) -> list[str]:
        return [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]


def check_slurm_tasks() -> None:
    """Check in a Slurm job that srun started this process in a way that Lightning supports.

    Call it before the Trainer is created. Outside a Slurm job it does nothing.

    Raises:
        ConfigError: with the command to start the run correctly.
    """
    slurm = _Slurm()
    if TorchElasticEnvironment.detect() or not slurm.detect():
        return  # torchrun inside a job starts its own ranks
    tasks, total = slurm.tasks_per_node, slurm.world_size()
    with first_rank_speaks(slurm):
        if not slurm.is_task and total > 1:
            raise ConfigError(
                f"This is a Slurm job of {total} tasks, but the command was not started by srun, so it would wait for "
                f"{total - 1} ranks that are never started. Put srun in front of it."
            )
        if not slurm.knows_tasks_per_node:
            nodes = len(tasks)
            per_node = -(-total // nodes)
            raise ConfigError(
                f"srun started {total} tasks on {_number(nodes, 'node')}, but Lightning needs the number of tasks per "
                f"node. Give --nodes={nodes} --ntasks-per-node={per_node} to sbatch or srun instead of --ntasks, with "
                f"trainer.num_nodes={nodes} and trainer.devices={per_node}."
            )


def check_ranks(environment: ClusterEnvironment, *, num_nodes: int, devices: int) -> None:
    """Check that one process exists, or will be started, for each device of each node.

    Args:
        environment: the Trainer's cluster environment. Those of srun, torchrun and Lightning itself are checked; others
            are accepted.
        num_nodes: the Trainer's number of nodes.
        devices: the Trainer's number of devices on each node.

    Raises:
        ConfigError: naming the numbers that differ, and how to change them in the launcher or in the Trainer.
    """
    if isinstance(environment, LightningEnvironment) and num_nodes > 1 and (missing := _ByHand().missing):
        raise ConfigError(
            f"trainer.num_nodes={num_nodes}, but nothing starts the command on the other nodes. Put srun or torchrun "
            f"in front of it; to start it by hand on each node, set {', '.join(missing)} there."
        )
    started = _started(environment)
    if started is None or started.per_node == [devices] * num_nodes:
        return
    ranks = set(started.per_node)
    differ = [len(started.per_node) != num_nodes, ranks != {devices}]
    command = started.how.format(num_nodes, devices).split()
    trainer = [f"--trainer.num_nodes={len(started.per_node)}", f"--trainer.devices={max(ranks)}"]
    remedy = f"Start it with {' '.join(compress(command, differ))}"
    if len(ranks) == 1:
        remedy += f", or set {' '.join(compress(trainer, differ))}"
    raise ConfigError(
        f"{started}, but trainer.num_nodes={num_nodes} and trainer.devices={devices} ask for "
        f"{_ranks_on(num_nodes, devices)}. {remedy}."
    )


def _started(environment: ClusterEnvironment) -> _Started | None:
    if isinstance(environment, SLURMEnvironment):
        slurm = _Slurm()
        tasks = slurm.tasks_per_node if slurm.is_task else [1]
        return _Started(by="srun", per_node=tasks, how="--nodes={} --ntasks-per-node={}")
    if isinstance(environment, TorchElasticEnvironment):
        return _Started(by="torchrun", per_node=_Torchrun().ranks_per_node, how="--nnodes={} --nproc-per-node={}")
    return None


def name_options(environment: ClusterEnvironment) -> str:
    """Text for errors about the number of devices and nodes: the launcher's options that set them."""
    started = _started(environment)
    if started is None:
        return ""
    nodes, devices = (option.partition("=")[0] for option in started.how.split())
    return f" With {started.by}, num_nodes is {nodes} and devices is {devices}."


@contextmanager
def first_rank_speaks(environment: ClusterEnvironment) -> Iterator[None]:
    """Let only the first rank report an error of checks that have the same result on every rank.

    The other ranks wait before they raise. When the first rank exits, srun and torchrun normally end them.
    """
    try:
        yield
    except ValueError:
        if _started(environment) is not None and _rank(environment) > 0:
            time.sleep(_LISTEN_SECONDS)
        raise


def _rank(environment: ClusterEnvironment) -> int:
    outside = isinstance(environment, SLURMEnvironment) and not _Slurm().is_task
    return 0 if outside else environment.global_rank()


def requeue_job() -> str | None:
    """Requeue the Slurm job of this process.

    Returns:
        Text of the error, or ``None`` on success.
    """
    if shutil.which("scontrol") is None:
        return f"scontrol, which requeues job {_Slurm().job}, is not on the PATH of this node"
    command = ["scontrol", "requeue", _Slurm().job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{' '.join(command)}: {done.stderr.strip()}" if done.returncode else None


def _ranks_on(nodes: int, ranks: int) -> str:
    return f"{_number(nodes, 'node')} with {_number(ranks, 'rank')}{' each' if nodes > 1 else ''}"


def _number(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

"""What a cluster has started, compared with what the Trainer asks for, before any process waits for another."""

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

# How long the other ranks leave it to the first one to say what is wrong with all of them, and to end. On a busy
# machine its end alone has taken more than 20 seconds.
_LISTEN_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class _Started:
    """Ranks that exist.

    Attributes:
        by: the command.
        per_node: ranks on each node.
        how: the options that decide how many, with a place for each number.
    """

    by: str
    per_node: list[int]
    how: str

    def __str__(self) -> str:
        nodes = Counter(self.per_node)
        return f"{self.by} started {' and '.join(_ranks_on(n, ranks) for ranks, n in nodes.items())}"


class _Slurm(SLURMEnvironment):
    """What Slurm tells its tasks and Lightning does not ask for."""

    def __init__(self) -> None:
        """Not Lightning's, which refuses and warns."""

    @property
    def is_task(self) -> bool:
        """Whether srun started this process. In a batch script itself, Slurm sets most of the same variables."""
        return "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ

    @property
    def tasks_per_node(self) -> list[int]:
        """Of the step; outside of one, of the job: ``2(x3),1`` is [2, 2, 2, 1]."""
        text = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", ""))
        found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
        return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]

    @property
    def knows_tasks_per_node(self) -> bool:
        """Whether Lightning can use it."""
        return self.world_size() == 1 or "SLURM_NTASKS_PER_NODE" in os.environ

    @property
    def job(self) -> str:
        """As scontrol wants it. The number alone would mean all tasks of an array where this is its last one."""
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        return os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


class _Torchrun(TorchElasticEnvironment):
    """What torchrun tells its ranks and Lightning does not ask for."""

    @property
    def ranks_per_node(self) -> list[int]:
        return [int(os.environ["LOCAL_WORLD_SIZE"])] * int(os.environ["GROUP_WORLD_SIZE"])


class _ByHand(LightningEnvironment):
    """What a person sets who starts one command on each node."""

    @property
    def missing(self) -> list[str]:
        return [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]


def check_slurm_tasks() -> None:
    """Check, in a Slurm job, that this process is one that Lightning can use. To be called before there is a Trainer.

    Raises:
        ConfigError: saying how to start it.
    """
    slurm = _Slurm()
    if TorchElasticEnvironment.detect() or not slurm.detect():
        return  # torchrun inside of a job starts its own ranks
    tasks, total = slurm.tasks_per_node, slurm.world_size()
    with first_rank_speaks(slurm):
        if not slurm.is_task and total > 1:
            raise ConfigError(
                f"This is a Slurm job of {total} tasks, but the command was not started by srun, so it would wait for "
                f"{total - 1} ranks that nobody starts. Put srun in front of it."
            )
        if not slurm.knows_tasks_per_node:
            nodes = len(tasks)
            per_node = -(-total // nodes)
            raise ConfigError(
                f"srun started {total} tasks on {_number(nodes, 'node')}, but Lightning must be told how many a node "
                f"has. Give --nodes={nodes} --ntasks-per-node={per_node} to sbatch or srun in place of --ntasks, with "
                f"trainer.num_nodes={nodes} and trainer.devices={per_node}."
            )


def check_ranks(environment: ClusterEnvironment, *, num_nodes: int, devices: int) -> None:
    """Check that there is one process for each device of each node, or that there will be.

    Args:
        environment: the Trainer's. srun, torchrun and Lightning's own are known; others are left to Lightning.
        num_nodes: of the Trainer.
        devices: of the Trainer, on each node.

    Raises:
        ConfigError: naming the numbers that differ, and how to change them on either side.
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
    """For an error that says how many devices and nodes to take: where those numbers come from."""
    started = _started(environment)
    if started is None:
        return ""
    nodes, devices = (option.partition("=")[0] for option in started.how.split())
    return f" With {started.by}, num_nodes is {nodes} and devices is {devices}."


@contextmanager
def first_rank_speaks(environment: ClusterEnvironment) -> Iterator[None]:
    """Around checks that come out the same on every rank: an error is said once, not once for each rank.

    When the first rank ends, srun and torchrun end the others. Those that are left to run say it after a while.
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
    """Have Slurm put the job of this process back into its queue.

    Returns:
        What went wrong, or ``None``.
    """
    if shutil.which("scontrol") is None:
        return f"there is no scontrol on the PATH of this node to put job {_Slurm().job} back into the queue"
    command = ["scontrol", "requeue", _Slurm().job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{' '.join(command)}: {done.stderr.strip()}" if done.returncode else None


def _ranks_on(nodes: int, ranks: int) -> str:
    return f"{_number(nodes, 'node')} with {_number(ranks, 'rank')}{' each' if nodes > 1 else ''}"


def _number(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

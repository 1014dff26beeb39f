"""A Slurm cluster on this machine: its own munge, a controller and a few nodes, all on loopback and in one folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
_SYSTEM = "/usr/sbin:/sbin"  # daemons lie where a user's PATH does not look
_CPUS = 4

# proctrack/linuxproc: control groups, the default, fail without a word where they cannot be used. cred_expire: after a
# requeue Slurm waits as long as a job's credential is valid, two minutes by default.
_CONFIG = """
ClusterName=one-machine
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=600
InactiveLimit=0
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_NODE = "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN\n"


class SlurmMissingError(Exception):
    """Slurm is not installed here; the message says what is missing."""


@dataclass
class Slurm:
    """A running cluster.

    Attributes:
        folder: of its state and logs.
        environment: for commands that talk to it, and for jobs.
    """

    folder: Path
    environment: dict[str, str]
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, *command: str) -> str:
        """Standard output of a command such as ``squeue``, which must succeed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, *arguments: str, options: Sequence[str], **variables: str) -> int:
        """``sbatch``; the job's number."""
        command = ["sbatch", "--parsable", *options, str(script), *arguments]
        environment = self.environment | variables
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def job(self, number: int) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def has_ended(self, number: int) -> bool:
        """Whether a job has ended for good."""
        return self.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def wait(self, number: int, *, seconds: float = 400) -> dict[str, str]:
        """Until a job has ended for good; what Slurm says of it then."""
        until(lambda: self.has_ended(number), seconds, what=f"the end of job {number}")
        return self.job(number)

    def stop(self) -> None:
        """End what was started here, by process number."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, *command: str) -> None:
        with (self.folder / f"{Path(command[0]).name}.{len(self._daemons)}.out").open("wb") as out:
            daemon = subprocess.Popen(command, env=self.environment, stdout=out, stderr=subprocess.STDOUT)
        self._daemons.append(daemon)


@contextlib.contextmanager
def slurm(folder: Path, *, nodes: int) -> Iterator[Slurm]:
    """A cluster while this is open.

    Args:
        folder: empty, on a short path, since a socket lies in it.
        nodes: how many, each with 4 CPUs, whatever the machine has.

    Raises:
        SlurmMissingError: if it is not installed.
    """
    path = f"{os.environ['PATH']}:{_SYSTEM}"
    if missing := [program for program in PROGRAMS if shutil.which(program, path=path) is None]:
        raise SlurmMissingError(
            f"{', '.join(missing)} not found; on Debian: apt-get install slurmctld slurmd slurm-client munge"
        )
    for name in ("state", "spool"):
        (folder / name).mkdir()
    controller_port, *ports = free_ports(1 + nodes)
    lines = [_NODE.format(name=f"node{i}", port=port, cpus=_CPUS) for i, port in enumerate(ports)]
    config = _CONFIG.format(user=getpass.getuser(), folder=folder, controller_port=controller_port)
    (folder / "slurm.conf").write_text("".join(lines) + config)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    cluster = Slurm(folder, environment | {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf")})
    which = {name: str(shutil.which(name, path=path)) for name in PROGRAMS}
    try:
        files = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "seed", "pid", "log")]
        cluster._start(which["munged"], "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        until((folder / "munge.socket").exists, 10, what="munged's socket", logs=folder)
        cluster._start(which["slurmctld"], "-D", "-i")
        for i in range(nodes):
            (folder / "spool" / f"node{i}").mkdir()
            cluster._start(which["slurmd"], "-D", "-N", f"node{i}")
        until(lambda: _idle(cluster) == nodes, 60, what=f"{nodes} idle nodes", logs=folder)
        yield cluster
    finally:
        cluster.stop()


def _idle(cluster: Slurm) -> int:
    command = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
    found = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False).stdout
    return int(found or 0) if found.strip().isdigit() else 0


def until(condition: Callable[[], bool], seconds: float, *, what: str, logs: Path | None = None) -> None:
    """Wait for something.

    Raises:
        TimeoutError: saying what, with the last lines of the logs of the daemons.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            files = [] if logs is None else sorted([*logs.glob("*.log"), *logs.glob("*.out")])
            tails = "".join(f"\n{file.name}:\n{file.read_text()[-1500:]}" for file in files)
            raise TimeoutError(f"no sign of {what} after {seconds:.0f} s.{tails}")
        time.sleep(0.1)


def free_ports(number: int) -> list[int]:
    """Ports of loopback that nobody listens on, and that no outgoing connection is given while a job waits to start."""
    below = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < number:
            port = random.SystemRandom().randrange(10_000, below)  # not the tests' seed, which is the same every time
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
    return found

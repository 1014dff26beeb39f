"""Real Slurm jobs: two nodes with two ranks each train what one node does, are queued again, and end when one dies."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from lightning_mimo.checkpoint.directory import damaged_files, read_manifest
from tests.slurm.one_machine import Slurm, free_ports, until
from tests.slurm.short_run import CONFIG, ROOT, STEPS, check_same, shortened

pytestmark = pytest.mark.slurm

SCRIPT = ROOT / "examples" / "slurm" / "fit.sbatch"
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")


def submit(cluster: Slurm, folder: Path, *, pause: float = 0.0) -> int:
    """examples/slurm/fit.sbatch on two nodes."""
    folder.mkdir(exist_ok=True)
    options = [*TWO_BY_TWO, f"--chdir={ROOT}", f"--output={folder}/log"]
    # The names of the nodes of this cluster do not resolve.
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    return cluster.submit(SCRIPT, CONFIG, *shortened(folder, pause=pause), options=options, **address)


def wait_for_step(cluster: Slurm, number: int, folder: Path, step: int) -> None:
    """Until a job has come to a step.

    Raises:
        AssertionError: with its log, if it ends before.
    """
    file = folder / "step"

    def reached() -> bool:
        return file.exists() and int(file.read_text() or 0) >= step

    until(lambda: reached() or cluster.has_ended(number), 400, what=f"step {step}")
    assert reached(), (folder / "log").read_text()


def test_two_nodes_train_what_one_does(cluster: Slurm, one_node: Path, tmp_path: Path) -> None:
    job = cluster.wait(submit(cluster, tmp_path))
    assert job["JobState"] == "COMPLETED", (tmp_path / "log").read_text()
    check_same(tmp_path, one_node)


def test_job_that_is_told_to_end_is_queued_again_and_ends_as_if_left_alone(
    cluster: Slurm, one_node: Path, tmp_path: Path
) -> None:
    number = submit(cluster, tmp_path, pause=0.3)
    wait_for_step(cluster, number, tmp_path, 5)
    cluster.run("scancel", "--signal=USR1", str(number))
    until(lambda: cluster.job(number)["Restarts"] == "1", 60, what="the requeue")
    job = cluster.wait(number)
    log = (tmp_path / "log").read_text()
    assert job["JobState"] == "COMPLETED", log
    saved = tmp_path / "root" / "hpc_ckpt_1.ckpt"
    manifest = read_manifest(saved)
    assert not list(damaged_files(saved, manifest, rank=0, ranks=1))
    assert 5 <= manifest["step"] < STEPS
    assert f"Ended by a signal: saved {saved} after step {manifest['step']}." in log
    assert f"Restoring states from the checkpoint path at {saved}" in log
    assert "Traceback" not in log
    check_same(tmp_path, one_node)


def test_cancelled_job_saves_and_does_not_come_back(cluster: Slurm, tmp_path: Path) -> None:
    number = submit(cluster, tmp_path, pause=0.3)
    wait_for_step(cluster, number, tmp_path, 2)
    cluster.run("scancel", str(number))
    job = cluster.wait(number)
    saved = tmp_path / "root" / "hpc_ckpt_1.ckpt"
    log = (tmp_path / "log").read_text()
    assert f"saved {saved} after step {read_manifest(saved)['step']}." in log
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert "Traceback" not in log


def test_task_that_is_killed_ends_the_job_and_is_named(cluster: Slurm, tmp_path: Path) -> None:
    number = submit(cluster, tmp_path, pause=0.3)
    wait_for_step(cluster, number, tmp_path, 2)
    os.kill(int((tmp_path / "pid2").read_text()), signal.SIGKILL)
    job = cluster.wait(number, seconds=60)
    assert job["JobState"] == "FAILED"
    assert "srun: error: node1: task 2: Killed" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("start", "arguments", "message"),
    [
        (
            ["srun", "--nodes=2", "--ntasks-per-node=1"],
            ["--trainer.num_nodes=2"],
            "srun started 2 nodes with 1 rank each, but trainer.num_nodes=2 and trainer.devices=4 ask for 2 nodes with "
            "4 ranks each. Start it with --ntasks-per-node=4, or set --trainer.devices=1.",
        ),
        (
            ["srun", "--nodes=2", "--ntasks=2"],
            ["--trainer.num_nodes=2", "--trainer.devices=1"],
            "srun started 2 tasks on 2 nodes, but Lightning needs the number of tasks per node. Give --nodes=2 "
            "--ntasks-per-node=1 to sbatch or srun instead of --ntasks, with trainer.num_nodes=2 and "
            "trainer.devices=1.",
        ),
        (
            ["srun", "--nodes=1", "--ntasks-per-node=3"],
            ["--trainer.devices=3", "--trainer.strategy.init_args.modules.images.dp=2"],
            "Module 'language': 3 ranks - (images 2) leaves 1, which is not a positive multiple of tp=2 = 2 ranks a "
            "replica. The smallest run that fits is devices=4, or devices=2 with num_nodes=2. With srun, num_nodes is "
            "--nodes and devices is --ntasks-per-node.",
        ),
        (
            ["salloc", "--job-name=forgotten", *TWO_BY_TWO],
            ["--trainer.num_nodes=2", "--trainer.devices=2"],
            "This is a Slurm job of 4 tasks, but the command was not started by srun, so it would wait for 3 ranks "
            "that are never started. Put srun in front of it.",
        ),
        (
            ["salloc", *TWO_BY_TWO],  # Lightning takes no notice of Slurm in an interactive job
            ["--trainer.num_nodes=2", "--trainer.devices=2"],
            "trainer.num_nodes=2, but nothing starts the command on the other nodes. Put srun or torchrun in front of "
            "it; to start it by hand on each node, set MASTER_ADDR, MASTER_PORT, NODE_RANK there.",
        ),
    ],
    ids=["tasks", "ntasks_alone", "layout", "no_srun", "no_srun_interactive"],
)
def test_numbers_that_do_not_fit_end_the_run_with_one_line(
    cluster: Slurm, tmp_path: Path, start: list[str], arguments: list[str], message: str
) -> None:
    options = ["--kill-on-bad-exit=1"] if start[0] == "srun" else []
    command = [*start, *options, "lightning-mimo", "fit", "--config", CONFIG, *shortened(tmp_path), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("lightning-mimo: error:") == 1, done.stderr
    assert f"lightning-mimo: error: {message}\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Initializing distributed" not in done.stderr

"""What srun, torchrun and a person's own hands have started, compared with the Trainer's numbers."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from lightning_mimo import ConfigError
from lightning_mimo.launch import cluster
from lightning_mimo.launch.cluster import check_ranks, check_slurm_tasks, first_rank_speaks, name_options, requeue_job

TASK = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}
"""As srun sets them for a task of 2 nodes x 2 tasks, beside SLURM_STEP_TASKS_PER_NODE."""


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "SLURM_JOB_NAME", *TASK):
        monkeypatch.delenv(name, raising=False)


def started_by_srun(monkeypatch: pytest.MonkeyPatch, tasks_per_node: str, **other: str) -> SLURMEnvironment:
    for name, value in {**TASK, "SLURM_STEP_TASKS_PER_NODE": tasks_per_node, **other}.items():
        monkeypatch.setenv(name, value)
    return SLURMEnvironment()


@pytest.mark.parametrize(
    ("tasks", "num_nodes", "devices", "message"),
    [
        (
            "1(x2)",
            2,
            4,
            r"srun started 2 nodes with 1 rank each, but trainer.num_nodes=2 and trainer.devices=4 ask for 2 nodes "
            r"with 4 ranks each. Start it with --ntasks-per-node=4, or set --trainer.devices=1.$",
        ),
        (
            "2(x2)",
            1,
            2,
            r"2 nodes with 2 ranks each, .* ask for 1 node with 2 ranks. Start it with --nodes=1, or set "
            r"--trainer.num_nodes=2.$",
        ),
        (
            "2(x2)",
            1,
            4,
            r"Start it with --nodes=1 --ntasks-per-node=4, or set --trainer.num_nodes=2 --trainer.devices=2.$",
        ),
        ("3,1", 2, 2, r"1 node with 3 ranks and 1 node with 1 rank, .* Start it with --ntasks-per-node=2.$"),
    ],
    ids=["tasks", "nodes", "both", "uneven"],
)
def test_srun_and_the_trainer_must_agree(
    monkeypatch: pytest.MonkeyPatch, tasks: str, num_nodes: int, devices: int, message: str
) -> None:
    environment = started_by_srun(monkeypatch, tasks)
    with pytest.raises(ConfigError, match=message):
        check_ranks(environment, num_nodes=num_nodes, devices=devices)


def test_srun_and_the_trainer_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = started_by_srun(monkeypatch, "2(x2)")
    check_ranks(environment, num_nodes=2, devices=2)
    assert name_options(environment) == " With srun, num_nodes is --nodes and devices is --ntasks-per-node."


def test_torchrun_and_the_trainer_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    environment = TorchElasticEnvironment()
    check_ranks(environment, num_nodes=1, devices=4)
    # As many ranks in all, so Lightning would let it pass, and the third rank would have no device.
    with pytest.raises(ConfigError, match=r"torchrun started 1 node with 4 .* --nnodes=2 --nproc-per-node=2, or set"):
        check_ranks(environment, num_nodes=2, devices=2)
    assert name_options(environment) == " With torchrun, num_nodes is --nnodes and devices is --nproc-per-node."


def test_several_nodes_by_hand_need_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = LightningEnvironment()
    check_ranks(environment, num_nodes=1, devices=4)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    with pytest.raises(ConfigError, match=r"num_nodes=2, but nothing starts .* srun or .* set MASTER_PORT, NOD"):
        check_ranks(environment, num_nodes=2, devices=4)
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setenv("NODE_RANK", "1")
    check_ranks(environment, num_nodes=2, devices=4)
    assert name_options(environment) == ""


def test_job_script_without_srun_is_refused_in_place_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by_srun(monkeypatch, "2(x2)", SLURM_TASKS_PER_NODE="2(x2)")
    check_slurm_tasks()
    for name in ("SLURM_STEP_ID", "SLURM_STEP_TASKS_PER_NODE"):  # not set in the script itself
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=r"a Slurm job of 4 tasks, but .* wait for 3 ranks that are never started"):
        check_slurm_tasks()
    with pytest.raises(ConfigError, match="srun started 1 node with 1 rank, but"):
        check_ranks(SLURMEnvironment(), num_nodes=2, devices=2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # as torchrun sets it
    check_slurm_tasks()


def test_ntasks_alone_is_not_enough_for_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by_srun(monkeypatch, "3,1")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(ConfigError, match=r"4 tasks on 2 nodes, .* --nodes=2 --ntasks-per-node=2 .* instead of"):
        check_slurm_tasks()


def test_only_the_first_rank_speaks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(cluster.time, "sleep", slept.append)
    environments: list[ClusterEnvironment] = [LightningEnvironment(), started_by_srun(monkeypatch, "2(x2)")]
    for environment in environments:
        with pytest.raises(ValueError, match="wrong"), first_rank_speaks(environment):
            raise ValueError("wrong")
    assert not slept
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(ValueError, match="wrong"), first_rank_speaks(environments[1]):
        raise ValueError("wrong")
    assert len(slept) == 1


def test_job_is_queued_again_by_its_name_in_an_array(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "scontrol, which requeues job 7, is not on the PATH of this node" in str(requeue_job())
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" >&2\nexit 1\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    assert requeue_job() == "scontrol requeue 7: requeue 7"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue_job() == "scontrol requeue 5_2: requeue 5_2"

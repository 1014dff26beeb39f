"""torchrun on two nodes, which both are this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.slurm.one_machine import free_ports
from tests.slurm.short_run import CONFIG, ROOT, check_same, shortened

pytestmark = pytest.mark.slurm

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
FIT = ("-m", "lightning_mimo", "fit", "--config", CONFIG)


def run_on_two_nodes(arguments: Sequence[str], folder: Path) -> str:
    """What both nodes print."""
    meet = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_ports(1)[0]}", "--rdzv-id=two"]
    # The name of this machine, which the nodes would tell each other otherwise, need not resolve.
    command = [*TORCHRUN, *meet, "--local-addr=127.0.0.1", *arguments]
    agents = []
    for node in range(2):
        with (folder / f"log{node}").open("w") as log:
            agents.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [agent.wait(timeout=400) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
            agent.wait()
    said = "".join((folder / f"log{node}").read_text() for node in range(2))
    assert codes == [0, 0], said
    return said


def test_two_nodes_train_what_one_does(one_node: Path, tmp_path: Path) -> None:
    run_on_two_nodes([*FIT, *shortened(tmp_path), "--trainer.num_nodes=2", "--trainer.devices=2"], tmp_path)
    check_same(tmp_path, one_node)


def test_the_example_prints_its_losses_on_each_node(tmp_path: Path) -> None:
    said = run_on_two_nodes(["-m", "examples.torchrun"], tmp_path)
    assert said.count("step 1: loss ") == said.count("step 20: loss ") == 2


def test_wrong_number_of_ranks_is_one_line(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--standalone", *FIT, *shortened(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode != 0
    assert done.stderr.count("lightning-mimo: error:") == 1, done.stderr
    assert (
        "lightning-mimo: error: torchrun started 1 node with 2 ranks, but trainer.num_nodes=1 and trainer.devices=4 "
        "ask for 1 node with 4 ranks. Start it with --nproc-per-node=4, or set --trainer.devices=2.\n"
    ) in done.stderr
    assert "Initializing distributed" not in done.stderr

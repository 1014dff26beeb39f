"""``lightning-mimo verify`` on a model that is right, and on five that are not."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import yaml

from tests.support.run_host import RunHost

Verify = Callable[..., tuple[int, str]]
Layout = dict[str, dict[str, int]]


@pytest.fixture
def verify(run_host: RunHost, tmp_path: Path) -> Verify:
    """Run the command on the faulty model; returns the exit code and what was printed."""

    def run(fault: str, *options: str, **modules: dict[str, int]) -> tuple[int, str]:
        config = {
            "trainer": {
                "devices": sum(prod(sizes.values()) for sizes in modules.values()),
                "strategy": {
                    "class_path": "lightning_mimo.MimoStrategy",
                    "init_args": {"modules": modules, "global_batch_size": 64, "num_microbatches": 2},
                },
            },
            "model": {
                "class_path": "tests.support.faulty.FaultyModule",
                "init_args": {
                    "size": {"num_layers": 12, "hidden_size": 32, "num_attention_heads": 4, "dropout": 0.1},
                    "fault": fault,
                },
            },
            "data": {"class_path": "tests.support.faulty.RowData"},
        }
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        log = tmp_path / "log"
        process = run_host.start("lightning_mimo.commands.cli:main", "verify", "--config", str(file), *options, log=log)
        return process.wait(timeout=300), log.read_text()

    return run


LANGUAGE_ONLY = {"images": {"dp": 1}, "language": {"tp": 4, "dp": 2}}
"""A layout with axes of one module; every axis is a run of its own."""
REPLICAS = {**LANGUAGE_ONLY, "images": {"dp": 16}}


@pytest.mark.exhaustive
def test_right_model_is_equal(verify: Verify) -> None:
    code, said = verify("none", **REPLICAS)
    assert code == 0, said
    assert "6 ranks in place of 24: images tp=1 pp=1 dp=2; language tp=2 pp=1 dp=2" in said
    assert "size: num_layers 12 -> 2, hidden_size 32 -> 32, num_attention_heads 4 -> 4" in said
    assert "equal: every difference is below 1e-09" in said


@pytest.mark.exhaustive
def test_axes_without_ranks_are_named(verify: Verify) -> None:
    code, said = verify("none", "--ranks=3", "--layers=1", **REPLICAS)
    assert code == 0, said
    assert "3 ranks in place of 24: images tp=1 pp=1 dp=1; language tp=2 pp=1 dp=1" in said
    assert "not checked, for want of ranks: dp of language, dp of images" in said


@pytest.mark.parametrize(
    ("fault", "layout", "what"),
    [
        (
            "low_rank",
            LANGUAGE_ONLY,
            ["dp=2 of language: equal", "tp=2 of language: gradients differ", "0.mlp.linear_fc1.down", "not summed"],
        ),
        pytest.param(
            "batch_statistics",
            REPLICAS,
            ["dp=2 of images: loss differ", "tp=2 of language: equal", "batch statistics"],
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "shape_of_shard",
            REPLICAS,
            ["tp=2 of language: initial weights differ", "an initializer that looks at the shape of a shard"],
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "mean_loss",
            REPLICAS,
            ["dp=2 of language: loss differ", "tp=2 of language: equal", "a loss that averages over the microbatch"],
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_fault_is_found_with_its_axis(verify: Verify, fault: str, layout: Layout, what: list[str]) -> None:
    code, said = verify(fault, **layout)
    assert code == 1, said
    for words in ("DIFFERENT", *what):
        assert words in said, said


def test_run_that_fails_is_reported(verify: Verify) -> None:
    code, said = verify("tokens_first", **LANGUAGE_ONLY)
    assert code == 2
    assert "training in one process ended with exit code" in said
    assert "Encoder was given" in said

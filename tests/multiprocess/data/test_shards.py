"""Training from tar shards, packed and with even work, has the gradients of one process without either."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mimo import ModuleParallelism
from lightning_mimo.data import TarShards
from tests.parity.cases import COSTLY, apart, packed, task
from tests.parity.layouts import Errors, Layout, errors
from tests.parity.model import CostlyPictures
from tests.parity.oracle import Task, truth
from tests.support.rank_pool import RankPool
from tests.support.shards import write_tar

EXACT = 1e-11
LAYOUT = apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2), num_microbatches=3)
SHARDS = 3


def write_shards(folder: Path, samples: CostlyPictures) -> None:
    for shard in range(SHARDS):
        each = []
        for number in range(shard * len(samples) // SHARDS, (shard + 1) * len(samples) // SHARDS):
            file = io.BytesIO()
            torch.save(samples[number], file)
            told = {"tokens": samples.length(number), "work": samples.cost(number)}
            each.append((f"{number:03d}", {"pt": file.getvalue(), "json": json.dumps(told).encode()}))
        write_tar(folder / f"{shard}.tar", each)


def decode(record: Any, modules: frozenset[str]) -> dict[str, Any]:
    sample = torch.load(io.BytesIO(record["pt"]))
    return sample if "images" in modules else {**sample, "modality_inputs": {}}


def length(record: Any) -> int:
    return json.loads(record["json"])["tokens"]


def cost(record: Any) -> dict[str, float]:
    return json.loads(record["json"])["work"]


def from_shards(folder: Path, given: Task, layout: Layout, expected: Any) -> Errors:
    shards = TarShards(f"{folder}/*.tar", decode, length=length, cost=cost)
    return errors(given, layout, expected, dataset=shards)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(packed(samples=COSTLY), id="packed"),
        pytest.param(task(samples=COSTLY), id="padded", marks=pytest.mark.exhaustive),
    ],
)
def test_gradients_are_those_of_one_process(given: Task, rank_pool: RankPool, tmp_path: Path) -> None:
    write_shards(tmp_path, CostlyPictures(given.samples))
    expected = rank_pool.run(truth, given, world_size=1)[0]
    found = rank_pool.run(from_shards, tmp_path, given, LAYOUT, expected, world_size=LAYOUT.ranks)
    worst = max(found, key=lambda each: each.gradient)
    assert worst.gradient < EXACT, worst.worst
    assert max(each.weight for each in found) < EXACT
    assert max(each.initial for each in found) == 0

"""Bad data and failing ranks: the cause on the screen, an exit code, and nothing left running."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_mimo import MimoStrategy, ModuleParallelism
from tests.parity.layouts import PoolEnvironment
from tests.support.evaluation import IMAGE, PicturesAndText, Run, TinyModule, make_trainer
from tests.support.rank_pool import RankFailure, RankPool
from tests.support.run_host import RunHost


class OnePlaceholderTooMany(PicturesAndText):
    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        if index == 5:
            sample["input_ids"][4] = IMAGE
        return sample


class LongerOnRank1(PicturesAndText):
    def __init__(self, length: int) -> None:
        super().__init__(length + torch.distributed.get_rank() % 2)


class ThreeLayers(TinyModule):
    num_layers = 3


def fit(dataset: type[PicturesAndText], modules: dict[str, ModuleParallelism], colocate: bool = False) -> None:
    torch.manual_seed(1)
    strategy = MimoStrategy(modules, 12, colocate=colocate, cluster_environment=PoolEnvironment())
    trainer = make_trainer(Run(steps=1), strategy)
    trainer.fit(ThreeLayers(), DataLoader(dataset(24), batch_size=12))


@pytest.mark.parametrize(
    ("ranks", "modules", "colocate"),
    [
        (2, {"images": ModuleParallelism(), "language": ModuleParallelism()}, False),
        (2, {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}, True),
        # The stage that counts the embeddings has not loaded the images, and is told of them through another.
        (4, {"images": ModuleParallelism(pp=3), "language": ModuleParallelism()}, False),
    ],
    ids=["apart", "colocated", "pipelined encoder"],
)
def test_wrong_number_of_placeholders_names_sample_module_and_both_numbers(
    rank_pool: RankPool, ranks: int, modules: dict[str, ModuleParallelism], colocate: bool
) -> None:
    with pytest.raises(
        RankFailure,
        match=r"Sample 5: input_ids has 3 placeholder tokens for 'images', but its 2 inputs give 2 embeddings",
    ):
        rank_pool.run(fit, OnePlaceholderTooMany, modules, colocate, world_size=ranks)


def test_datasets_of_different_length_are_refused_on_all_ranks(rank_pool: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"different length on different ranks: \{0: 24, 1: 25\}"):
        rank_pool.run(
            fit, LongerOnRank1, {"images": ModuleParallelism(), "language": ModuleParallelism()}, world_size=2
        )


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_failing_rank_ends_all_with_its_traceback(rank: int, tmp_path: Path, run_host: RunHost) -> None:
    log = tmp_path / "log"
    arguments = [
        *("fit", "--config", "configs/digits_vlm.yaml"),
        *(f"--model.class_path=tests.support.failing.FailsOnRank{rank}", "--trainer.max_steps=3"),
        *(f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.init_args.save_dir={tmp_path}"),
    ]
    process = run_host.start("lightning_mimo.commands.cli:main", *arguments, log=log)
    failed_at = None
    ranks: list[psutil.Process] = []
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        ranks = max(psutil.Process(process.pid).children(recursive=True), ranks, key=len)
        if failed_at is None and f"the cause, on rank {rank}" in log.read_text():
            failed_at = time.monotonic()
        time.sleep(0.1)
    process.kill()
    text = log.read_text()
    assert f"ZeroDivisionError: the cause, on rank {rank}" in text, text[-3000:]
    assert process.returncode not in (0, -9)
    assert failed_at is None or time.monotonic() - failed_at < 30
    assert len(ranks) == 4, "three ranks and the process that watches over them"
    psutil.wait_procs(ranks, timeout=5)
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]

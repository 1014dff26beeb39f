"""A rank that stops: every rank says what it waits for, the missing one is named, and all processes end."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tests.support.run_host import RunHost

TIMEOUT = 5  # seconds that a rank may wait
BOUND = 40  # seconds from the first step to the end of all processes

FORWARD = {
    0: r"rank 0 (images, stage 0) has been in forward of images, microbatch 0 for",
    1: r"rank 1 (images, stage 0) has waited",
    2: r"s to receive images -> language, forward, microbatch 0, from ranks 0, 1.",
    3: r"s to receive images -> language, forward, microbatch 0, from ranks 0, 1.",
}
REDUCTION = {
    0: r"s to reduce the gradients of images, with rank 1.",
    1: r"rank 1 (images, stage 0) has made no progress for",
    2: r"rank 2 (language, stage 0) has waited",
    3: r"rank 3 (language, stage 0) has waited",
}


@pytest.mark.parametrize(
    ("module", "missing", "said", "telemetry"),
    [
        ("StopsInForwardOfRank0", 0, FORWARD, "true"),
        pytest.param("StopsInForwardOfRank0", 0, FORWARD, "false", marks=pytest.mark.exhaustive),
        pytest.param("StopsBeforeReductionOnRank1", 1, REDUCTION, "true", marks=pytest.mark.exhaustive),
    ],
    ids=["forward", "forward-without_telemetry", "reduction"],
)
def test_a_rank_that_stops_is_named_and_all_end(
    module: str, missing: int, said: dict[int, str], telemetry: str, tmp_path: Path, run_host: RunHost
) -> None:
    log = tmp_path / "log"
    arguments = [
        *("fit", "--config", "configs/digits_vlm.yaml"),
        *(f"--model.class_path=tests.support.failing.{module}", "--trainer.max_steps=3"),
        *(f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.init_args.save_dir={tmp_path}"),
        *(f"--trainer.strategy.init_args.monitoring.timeout=0:0:{TIMEOUT}", "--trainer.num_sanity_val_steps=0"),
        f"--trainer.strategy.init_args.monitoring.telemetry={telemetry}",
    ]
    process = run_host.start("lightning_mimo.commands.cli:main", *arguments, log=log)
    stopped_at = None
    ranks: list[psutil.Process] = []
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        ranks = max(psutil.Process(process.pid).children(recursive=True), ranks, key=len)
        if stopped_at is None and "Epoch 0" in log.read_text():
            stopped_at = time.monotonic()
        time.sleep(0.1)
    ended_at = time.monotonic()
    process.kill()
    text = log.read_text()
    assert process.returncode == 1, text[-3000:]
    for rank, words in said.items():
        assert any(line.startswith(f"rank {rank} ") and words in line for line in text.splitlines()), text[-3000:]
    assert f"the others wait for rank {missing} (images, stage 0), which has" in text
    assert f"failing.py:{_line_of_sleep()} _sleep" in text, "where it stands"
    assert stopped_at is not None and ended_at - stopped_at < BOUND
    assert len(ranks) == 4, "three ranks and the process that watches over them"
    psutil.wait_procs(ranks, timeout=10)
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]


def _line_of_sleep() -> int:
    lines = (Path(__file__).parents[2] / "support" / "failing.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if "time.sleep(600)" in line)

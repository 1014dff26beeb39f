"""No damaged checkpoint is loaded in silence, changes anything before it is refused, or is not refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lightning_mimo import ModuleParallelism
from tests.fuzz.checkpoints import damage
from tests.fuzz.tally import HEAD, Outcome, Tally
from tests.multiprocess.checkpoint.test_checkpoint import MIXED, save
from tests.parity.cases import task, together
from tests.parity.model import Samples
from tests.support.checkpoint_trials import Result, is_clear, try_checkpoints
from tests.support.rank_pool import RankPool

RUN = task(samples=Samples(number=36), steps=3, dropout=0.1, **MIXED)
LAYOUT = together(ModuleParallelism(), ModuleParallelism())
_OUTCOMES: dict[Result, Outcome] = {
    "refused": "refused",
    "accepted": "accepted",
    "changed by a refusal": "silent",
    "accepted with other numbers": "silent",
    "accepted with other tensors": "silent",
    "raw error": "raw",
    "hung": "hung",
}


def try_all(rank_pool: RankPool, folder: Path, seeds: range) -> Tally:
    original = folder / "original.ckpt"
    rank_pool.run(save, RUN, LAYOUT, str(original), 1, world_size=1)
    done: dict[str, str] = {}
    for seed in seeds:
        path = folder / f"{seed}.ckpt"
        shutil.copytree(original, path)
        done[str(path)] = f"{seed}: {damage(path, seed)}"
    (trials,) = rank_pool.run(try_checkpoints, RUN, LAYOUT, str(original), list(done), world_size=1)
    tally = Tally(kind="checkpoints")
    for what, trial in zip(done.values(), trials, strict=True):
        outcome = _OUTCOMES[trial.result]
        if trial.result == "accepted with other numbers" and what.endswith("signed"):
            outcome = "accepted"  # numbers in their ranges, with the checksum that belongs to them
        if outcome == "refused" and not is_clear(trial.message):
            outcome = "raw"
        tally.add(outcome, what, trial.message)
    return tally


def test_damaged_checkpoints_are_refused_by_name(rank_pool: RankPool, tmp_path: Path) -> None:
    tally = try_all(rank_pool, tmp_path, range(40))
    assert not tally.bad, "\n".join(tally.bad)
    assert tally.outcomes["refused"] > 20


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(5))
def test_many_damaged_checkpoints_are_refused_by_name(
    rank_pool: RankPool, tmp_path: Path, part: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tally = try_all(rank_pool, tmp_path, range(1000 + 100 * part, 1100 + 100 * part))
    with capsys.disabled():
        print(f"\n{HEAD}\n{tally}")
    assert not tally.bad, "\n".join(tally.bad)

"""A step under Trainer and MimoStrategy against a bare loop around megatron-core, in one set of ranks, in turn.

A callback runs blocks of steps of three bare loops between blocks of the Trainer's own steps. All train models of their
own from the same start on the same batches; that their losses are equal is checked. The first has megatron-core's
MimoOptimizer, the second this package's, so that nothing is left but what Trainer and strategy cost; the third tells
the ranks in every step what Megatron-Bridge does. Telemetry is turned off in every other block of the Trainer's.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from examples.digits.data import DigitsData
from examples.digits.model import DigitsModule
from lightning_mimo import MimoModule, MimoStrategy, ModuleParallelism
from lightning_mimo.models.sizes import TransformerSize
from tests.benchmarks.bare_loop import BareLoop, BridgeLoop, OneCollectiveLoop
from tests.benchmarks.paired import Comparison
from tests.benchmarks.quiet import quiet_trainer
from tests.benchmarks.report import Cell, Report
from tests.benchmarks.sleeping import Cost, SleepingData, SleepingModule
from tests.parity.layouts import PoolEnvironment
from tests.support.rank_pool import RankPool

TRAINER, UNWATCHED = "trainer", "without telemetry"
BARE, ONE_COLLECTIVE, BRIDGE = "bare", "bare, one collective", "bridge"
LOOPS = {BARE: BareLoop, ONE_COLLECTIVE: OneCollectiveLoop, BRIDGE: BridgeLoop}
TURN = (TRAINER, UNWATCHED, *LOOPS, *reversed(LOOPS), UNWATCHED, TRAINER)
"""One round; any two of them are A B B A. The Trainer's blocks at the seam are one after the other, too."""
LAYOUT = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}
RANKS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and for how long.

    Attributes:
        make: module, and a DataLoader as for one process.
        batch: global batch size.
        microbatches: pipeline microbatches.
        steps: of one block.
        skipped: the first steps of a block, which are not counted.
        rounds: of ten blocks each.
        words: what the table says.
    """

    make: Callable[[], tuple[MimoModule, DataLoader]]
    batch: int
    microbatches: int
    steps: int
    skipped: int
    rounds: int
    words: str


def _nothing() -> tuple[MimoModule, DataLoader]:
    return _sleeping(Cost(forward=0, backward=0), batch=4)


def _second() -> tuple[MimoModule, DataLoader]:
    """4 microbatches of 2 samples, 0.21 s for each sample and module."""
    return _sleeping(Cost(forward=0.07, backward=0.14), batch=8)


def _sleeping(cost: Cost, *, batch: int) -> tuple[MimoModule, DataLoader]:
    return SleepingModule({"images": cost, "language": cost}), DataLoader(SleepingData(["images"]), batch_size=batch)


def _digits() -> tuple[MimoModule, DataLoader]:
    data = DigitsData(global_batch_size=128)
    data.setup("fit")
    sizes = {name: TransformerSize(num_layers=n, hidden_size=64, num_attention_heads=4) for name, n in _LAYERS.items()}
    return DigitsModule(**sizes, lr=3e-3), DataLoader(data.train_set, batch_size=128)


_LAYERS = {"vision": 2, "language": 3}
CASES = {
    "nothing": Case(
        make=_nothing, batch=4, microbatches=1, steps=25, skipped=3, rounds=20, words="a model that computes nothing"
    ),
    "digits": Case(make=_digits, batch=128, microbatches=1, steps=6, skipped=1, rounds=40, words="examples/digits"),
    "second": Case(make=_second, batch=8, microbatches=4, steps=3, skipped=1, rounds=6, words="sleeps over 1 s"),
}


@dataclass(frozen=True, kw_only=True)
class Turns:
    """One rank's medians of each block, by what ran in it: seconds on the clock and of this thread's processor time."""

    wall: dict[str, list[float]]
    processor: dict[str, list[float]]
    losses: dict[str, list[float]]


class TakesTurns(pl.Callback):
    """Times the Trainer's steps, and runs the others' between its blocks."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._todo = iter(TURN * (1 + case.rounds))  # the first round is not counted
        self._marks: list[tuple[float, float]] = []
        self._kind = next(self._todo)
        self._telemetry: Any = None
        self._loops: dict[str, BareLoop] = {}
        self._losses: list[float] = []
        self._wall: dict[str, list[float]] = {kind: [] for kind in TURN}
        self._processor: dict[str, list[float]] = {kind: [] for kind in TURN}

    def on_train_start(self, trainer: pl.Trainer, pl_module: MimoModule) -> None:
        _, loader = self._case.make()
        self._telemetry = trainer.strategy.run.batches._telemetry
        self._loops = {kind: loop(trainer, pl_module, loader) for kind, loop in LOOPS.items()}
        self._begin()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._mark()
        self._losses.append(trainer.optimizers[0].outcome.totals.accumulated_loss)
        if len(self._marks) <= self._case.steps:
            return
        self._end_block()
        while self._kind in self._loops:
            self._begin()
            for _ in range(self._case.steps):
                self._loops[self._kind].step()
                self._mark()
            self._end_block()
        trainer.strategy.run.batches._telemetry = self._telemetry if self._kind == TRAINER else None
        trainer.should_stop = self._kind == ""
        self._begin()

    @property
    def turns(self) -> Turns:
        whole = len(TURN) // len(self._wall)
        return Turns(
            wall={kind: figures[whole:] for kind, figures in self._wall.items()},
            processor={kind: figures[whole:] for kind, figures in self._processor.items()},
            losses={TRAINER: self._losses, **{kind: loop.losses for kind, loop in self._loops.items()}},
        )

    def _begin(self) -> None:
        dist.barrier()
        self._marks.clear()
        self._mark()

    def _mark(self) -> None:
        self._marks.append((time.perf_counter(), time.thread_time()))

    def _end_block(self) -> None:
        counted = self._marks[self._case.skipped :]
        for figures, at in ((self._wall, 0), (self._processor, 1)):
            steps = [after[at] - before[at] for before, after in itertools.pairwise(counted)]
            figures[self._kind].append(statistics.median(steps))
        self._kind = next(self._todo, "")


def _run(name: str, rounds: int) -> Turns:
    case = CASES[name]
    torch.manual_seed(1)
    module, loader = case.make()
    turns = TakesTurns(Case(**{**vars(case), "rounds": rounds}))
    strategy = MimoStrategy(dict(LAYOUT), case.batch, case.microbatches, cluster_environment=PoolEnvironment())
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(strategy, max_steps=100_000, callbacks=[turns], logger=CSVLogger(folder))
        trainer.fit(module, loader)
    strategy.infra.destroy()
    return turns.turns


def _same_losses(losses: dict[str, list[float]]) -> int:
    """Check that all trained the same; how many steps were compared.

    MimoOptimizer takes norms in float32, this package in float64: that little grows with the steps.
    """
    steps = min(map(len, losses.values()))
    for one, other, compared in (
        (TRAINER, ONE_COLLECTIVE, steps),
        (BARE, BRIDGE, steps),
        (TRAINER, BARE, min(steps, 25)),
    ):
        for step, (found, expected) in enumerate(zip(losses[one][:compared], losses[other], strict=False)):
            assert abs(found - expected) <= 1e-6 * abs(expected), f"{one}, step {step}: {found}, {other}: {expected}"
    return steps


def _row(name: str, what: str, comparison: Comparison) -> list[Cell]:
    interval, control = ("{:.3f} .. {:.3f}".format(*each) for each in (comparison.interval, comparison.control))
    a, b = (statistics.median(each) * 1000 for each in (comparison.a, comparison.b))
    return [
        CASES[name].words,
        what,
        a,
        b,
        comparison.difference * 1000,
        comparison.ratio,
        interval,
        control,
    ]


def measure(pool: RankPool, *, quick: bool) -> Report:
    rows, details = [], {}
    for name, case in CASES.items():
        rounds = 1 if quick else case.rounds
        ranks = pool.run(_run, name, rounds, world_size=RANKS, timeout=1200)
        compared = _same_losses(ranks[0].losses)
        wall = ranks[0].wall
        processor = {
            kind: [statistics.mean(rank.processor[kind][i] for rank in ranks) for i in range(2 * rounds)]
            for kind in dict.fromkeys(TURN)
        }
        details[name] = {"wall": wall, "processor": processor, "equal losses": compared}
        for a, b in ((TRAINER, BARE), (TRAINER, ONE_COLLECTIVE), (TRAINER, BRIDGE), (TRAINER, UNWATCHED)):
            for clock, figures in (("", wall), (", processor", processor)):
                comparison = Comparison(a=tuple(figures[a]), b=tuple(figures[b]))
                rows.append(_row(name, f"{a} : {b}{clock}", comparison))
    return Report(
        title="A step under Trainer and MimoStrategy: milliseconds, and ratios of blocks that took turns",
        columns=("model", "A : B", "A", "B", "A - B", "A / B", "95 %", "control"),
        rows=rows,
        notes=(
            "4 ranks, images dp=2, language tp=2. processor: of the main thread, mean of the ranks; else of the clock.",
            "95 %: where the median lies, by all rounds. control: of two neighbouring blocks of the same.",
            "bare: megatron-core's MimoOptimizer, with the loss four collectives; one collective: with our optimizer;",
            "bridge: MimoOptimizer, and the ranks are told as in Megatron-Bridge, six. Losses of all are equal.",
            "The strategy loads the next batch while a rank waits for others, bare loops before a step begins.",
        ),
        details=details,
    )

"""Encoders run ahead by as many microbatches as they are told, and nothing that is learned depends on it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_mimo import ModuleParallelism
from lightning_mimo.observe.spans import COMPUTING, Span
from tests.parity.cases import apart, task
from tests.parity.layouts import Layout, train
from tests.parity.model import Samples
from tests.support.rank_pool import RankPool
from tests.support.tiers import exhaustive

MICROBATCHES = 6
LAYOUT = apart(ModuleParallelism(pp=2), ModuleParallelism(pp=2), num_microbatches=MICROBATCHES)


class Order(pl.Callback):
    """What this rank computed in the last step: f and b for forward and backward passes."""

    def __init__(self) -> None:
        self.passes = ""

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.strategy.step_listeners.append(self._listen)

    def _listen(self, spans: list[Span]) -> None:
        kinds = [span.info.kind for span in spans if span.info.kind in COMPUTING and span.info.label != "loss"]
        self.passes = "".join(kind[0] for kind in kinds)


def train_ahead(layout: Layout, ahead: int) -> tuple[str, list[float], list[float]]:
    order = Order()
    what = task(steps=2, samples=Samples(number=4 * MICROBATCHES), batch=2 * MICROBATCHES)
    recorder, _, strategy = train(what, layout, callbacks=[order], strategy_options={"encoder_run_ahead": ahead})
    strategy.infra.destroy()
    return order.passes, recorder.losses, recorder.norms


@pytest.mark.parametrize("ahead", [exhaustive(1), 3, exhaustive(9)])
def test_bounded_and_without_effect(rank_pool: RankPool, ahead: int) -> None:
    found = {each: rank_pool.run(train_ahead, LAYOUT, each, world_size=LAYOUT.ranks) for each in (0, ahead)}
    for each, ranks in found.items():
        first, second, *language = [passes.index("b") for passes, _, _ in ranks]
        # 1F1B's own: one more than there are stages behind. The last of them is not ahead of anything.
        assert first == min(4 + each, MICROBATCHES)
        assert second == min(3 + each, MICROBATCHES)
        assert language == [2, 1]
        assert {passes.count("f") for passes, _, _ in ranks} == {passes.count("b") for passes, _, _ in ranks} == {6}
    assert [learned for _, *learned in found[ahead]] == [learned for _, *learned in found[0]]

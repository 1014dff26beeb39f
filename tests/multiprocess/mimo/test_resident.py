"""No rank holds another module's parameters, not even while the model is being built or a checkpoint loaded."""

from __future__ import annotations

from pathlib import Path

from lightning_mimo import ModuleParallelism
from lightning_mimo.models.sizes import TransformerSize
from tests.benchmarks.memory import run
from tests.parity.layouts import Layout
from tests.support.rank_pool import RankPool

SMALL = TransformerSize(num_layers=1, hidden_size=32, num_attention_heads=4)
LARGE = TransformerSize(num_layers=2, hidden_size=1024, num_attention_heads=8)
# Buffers of process groups and modules that are imported late come to some 30 MiB.
LITTLE = 64 * 2**20


def test_a_rank_never_holds_what_belongs_to_another_module(rank_pool: RankPool, tmp_path: Path) -> None:
    layout = Layout(modules={"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2, dp=1)})
    images, *language = rank_pool.run(run, layout, tmp_path / "some.ckpt", SMALL, LARGE, world_size=3)
    assert [each.modules for each in (images, *language)] == [("images",), ("language",), ("language",)]
    for each in (images, *language):
        assert each.made == each.weights > 0
    # The language module is 100 MB, its gradients and Adam's moments three times as much, and it is cut in two.
    assert images.weights < 8 * 2**20 and language[0].weights > 45 * 2**20
    for stage, peak in images.peaks.items():
        assert peak < LITTLE, stage
    # The same watch sees what is there: weights and gradients, then the moments too.
    assert min(each.peaks["construction"] for each in language) > 1.9 * language[0].weights
    assert min(each.peaks["first step"] for each in language) > 3.9 * language[0].weights

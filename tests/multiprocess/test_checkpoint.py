"""Weights written in one layout are read back in any other, each parameter whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mimo import ModuleParallelism as Cut
from lightning_mimo.checkpoint import load_weights, save_weights
from lightning_mimo.initialization import cut_shard
from lightning_mimo.model import build_mimo_model
from tests.multiprocess.parity.cases import apart, task, together
from tests.multiprocess.parity.layouts import Layout, open_world, parameters
from tests.multiprocess.parity.model import Model, ParityModule
from tests.multiprocess.parity.oracle import SEED, Tensors, truth
from tests.multiprocess.rank_pool import RankPool

LAYOUTS = {
    "dense": (Model(), apart(Cut(dp=2), Cut(tp=2, pp=2)), together(Cut(tp=2), Cut(dp=2))),
    "tied": (Model(tied=True), apart(Cut(pp=2), Cut(pp=2)), together(Cut(), Cut())),
    "experts": (
        Model(experts=4),
        apart(Cut(dp=2), Cut(tp=2, dp=2, ep=2), sequence_parallel=True),
        together(Cut(dp=2), Cut(dp=2, ep=2)),
    ),
    "shared_experts": (Model(experts=4), apart(Cut(), Cut(dp=4, ep=2, expt_tp=2)), together(Cut(), Cut())),
}


def save(model: Model, layout: Layout, path: str) -> None:
    with open_world(layout) as infra:
        module = ParityModule(model, sequence_parallel=layout.sequence_parallel)
        save_weights(path, build_mimo_model(module.configure_mimo(infra), infra, seed=SEED), infra, extra={"step": 3})


def differences(model: Model, layout: Layout, path: str, whole: Tensors) -> dict[str, float]:
    """Load into a model that began with other weights, and compare with the oracle's, by name."""
    with open_world(layout) as infra:
        module = ParityModule(model, sequence_parallel=layout.sequence_parallel)
        loaded = build_mimo_model(module.configure_mimo(infra), infra, seed=SEED + 1)
        assert load_weights(path, loaded, infra) == {"step": 3}
        return {
            name: float((parameter - cut_shard(whole[name], parameter, groups)).abs().max())
            for name, parameter, groups in parameters(loaded, infra)
        }


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_read_back_in_another_layout(rank_pool: RankPool, tmp_path: Path, name: str) -> None:
    model, written, read = LAYOUTS[name]
    whole = rank_pool.run(truth, task(steps=0, **vars(model)), world_size=1)[0].initial
    path = str(tmp_path / "some.ckpt")
    rank_pool.run(save, model, written, path, world_size=written.ranks)
    for layout in (written, read):
        found = rank_pool.run(differences, model, layout, path, whole, world_size=layout.ranks)
        assert set().union(*found) == whole.keys()
        assert all(difference == 0 for each in found for difference in each.values())

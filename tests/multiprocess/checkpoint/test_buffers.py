"""Persistent buffers of encoders are saved, verified, exported and loaded in any layout, and equal on all replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_mimo import ModuleParallelism
from lightning_mimo.checkpoint.directory import read_manifest
from lightning_mimo.checkpoint.tools import export
from lightning_mimo.mimo.parameter_names import named_buffers_of
from tests.multiprocess.checkpoint.test_checkpoint import SaveOnce
from tests.parity.cases import apart, task, together
from tests.parity.layouts import Layout, train
from tests.parity.model import ClipEncoder, ParityModule, Samples
from tests.support.rank_pool import RankFailure, RankPool

NAME = "audio.encoders.clips"


class KeepsStatistics(ClipEncoder):
    """Has statistics that do not change, as a FrozenBatchNorm, and counts its calls."""

    def __init__(self, start: float = 3.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((4,), start))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(()), persistent=False)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return super().forward(frames, lengths)


class StartsElsewhere(KeepsStatistics):
    def __init__(self) -> None:
        super().__init__(start=0.0)


class Averages(KeepsStatistics):
    """A running mean of the replica's own samples."""

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * frames.mean().float()
        return super().forward(frames, lengths)


APART = apart(ModuleParallelism(), ModuleParallelism(), ModuleParallelism(dp=2))
ONE = together(ModuleParallelism(), ModuleParallelism(), ModuleParallelism())


def run(encoder: type[torch.nn.Module], layout: Layout, steps: int, *, save: Path | None = None, **options: Any) -> Any:
    chosen = task(audio=True, clip_encoder=encoder, samples=Samples(clips=(1,)), steps=steps)
    callbacks = [] if save is None else [SaveOnce(str(save), 1)]
    _, module, strategy = train(chosen, layout, module=ParityModule(chosen.model), callbacks=callbacks, **options)
    infra = strategy.infra
    found = dict(named_buffers_of(module.model, infra, "audio")) if "audio" in infra.participating_modules else {}
    infra.destroy()
    return {name: tensor.tolist() for name, tensor in found.items()}


def test_buffers_go_from_one_layout_to_another(rank_pool: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    found = rank_pool.run(run, KeepsStatistics, APART, 1, save=path, world_size=4)
    assert [sorted(each) for each in found] == [[], *[[f"{NAME}.calls", f"{NAME}.mean"]] * 2, []]
    assert found[1][f"{NAME}.calls"] == 2, "a call for each microbatch"
    assert read_manifest(path)["parameters"][f"{NAME}.mean"] == [4]
    (resumed,) = rank_pool.run(run, StartsElsewhere, ONE, 2, ckpt_path=str(path), world_size=1)
    assert resumed == {f"{NAME}.mean": [3.0] * 4, f"{NAME}.calls": 2 + 2}
    export(path, tmp_path / "a.safetensors")
    exported = load_file(tmp_path / "a.safetensors")
    assert exported[f"{NAME}.mean"].tolist() == [3.0] * 4 and int(exported[f"{NAME}.calls"]) == 2
    with pytest.raises(RankFailure, match=rf"it holds '{NAME}\.\w+', which this model does not have"):
        rank_pool.run(run, ClipEncoder, ONE, 2, ckpt_path=str(path), world_size=1)


def test_buffer_that_depends_on_the_replicas_samples_is_refused(rank_pool: RankPool) -> None:
    with pytest.raises(RankFailure, match=rf"The buffer '{NAME}\.mean' has become different on the replicas"):
        rank_pool.run(run, Averages, APART, 2, world_size=4)

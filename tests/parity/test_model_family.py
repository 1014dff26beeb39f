"""The template of a model family trains in any layout as in one process."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.mimo import MimoModelConfig
from torch.utils.data import Dataset

from examples.model_family import SeriesEncoder, SeriesModule, SeriesPatches, sample
from lightning_mimo import ConfigError, MimoModelInfra, MimoModule
from lightning_mimo import ModuleParallelism as Cut
from tests.parity.family import check_parity
from tests.parity.layouts import Layout
from tests.support.rank_pool import RankPool

LAYOUTS = {
    "series_tp2-language_dp2": Layout(modules={"series": Cut(tp=2, dp=1), "language": Cut(dp=2)}),
    "series_dp2pp2-language_tp2": Layout(modules={"series": Cut(pp=2, dp=2), "language": Cut(tp=2, dp=1)}),
    "colocated_tp2_and_dp2": Layout(modules={"series": Cut(tp=2, dp=1), "language": Cut(dp=2)}, colocate=True),
}


class Samples(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        return sample(index)


def family() -> tuple[MimoModule, Dataset]:
    return SeriesModule(), Samples()


class SeesOtherSamples(SeriesEncoder):
    """Scales by the number of items in the batch, which depends on the layout."""

    def forward(self, values: torch.Tensor | None = None, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(values, hidden_states) * (1 + 1e-3 * len(values))


class WrongModule(SeriesModule):
    def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
        config = super().configure_mimo(infra)
        config.modality_submodules_spec["series"].submodules["encoders"]["transformer"].module = SeesOtherSamples
        return config


def wrong_family() -> tuple[MimoModule, Dataset]:
    return WrongModule(), Samples()


def test_template_trains_as_one_process(rank_pool: RankPool) -> None:
    check_parity(rank_pool, family, LAYOUTS)


def test_model_that_depends_on_the_layout_is_found_out(rank_pool: RankPool) -> None:
    replicas = Layout(modules={"series": Cut(dp=2), "language": Cut(dp=1)})
    with pytest.raises(AssertionError, match="replicas: gradient of "):
        check_parity(rank_pool, wrong_family, {"replicas": replicas})


def test_series_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps=8 is not a multiple of steps_per_patch=3"):
        SeriesPatches(steps=8, channels=1, steps_per_patch=3)

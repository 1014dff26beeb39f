"""An estimate runs whole steps: few layers stand for many, recomputation and messages are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_mimo import ModuleParallelism
from lightning_mimo.models.sizes import Recompute
from lightning_mimo.planning import rank_step
from lightning_mimo.planning.costs import RankEstimate
from tests.support.estimates import SIZES, estimate

APART = {"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2, pp=2, dp=1)}


OPTIONS = {"sequence_parallel": True, "recompute": Recompute(), "layers": 12}


@pytest.fixture(scope="module")
def estimated() -> tuple[RankEstimate, ...]:
    return estimate(APART, **OPTIONS)


@pytest.mark.exhaustive
def test_few_layers_stand_for_all(estimated: tuple[RankEstimate, ...]) -> None:
    assert_alike(estimated, estimate(APART, **OPTIONS, all_layers=True))


# With nothing to train, what a layer has computed is freed in the next one, so a single layer would not do.
@pytest.mark.parametrize(
    "options",
    [{"frozen": ("images.encoders",)}, pytest.param({"experts": 2}, marks=pytest.mark.exhaustive)],
    ids=["frozen_encoder", "experts"],
)
def test_few_layers_stand_for_all_where_they_keep_less(options: dict[str, Any]) -> None:
    modules = {"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1)}
    few, all_ = (estimate(modules, layers=6, **options, all_layers=all_layers) for all_layers in (False, True))
    assert_alike(few, all_)


def assert_alike(estimated: tuple[RankEstimate, ...], of_all_layers: tuple[RankEstimate, ...]) -> None:
    for few, all_ in zip(estimated, of_all_layers, strict=True):
        assert few.peak_at == all_.peak_at
        assert few.memory.total == pytest.approx(all_.memory.total, rel=1e-3)
        for what in ("forward_flops", "backward_flops", "recompute_flops"):
            assert getattr(few, what) == getattr(all_, what)
        for name, work in few.work.items():
            assert work.forward.messages == all_.work[name].forward.messages


def test_flops_are_those_of_the_matrices(estimated: tuple[RankEstimate, ...]) -> None:
    _, first, second = estimated
    tokens = SIZES.samples_per_microbatch * SIZES.tokens
    width, layers = SIZES.hidden, 6
    # qkv and projection, two matrices of the MLP; of attention half, because it is causal; all divided by tp.
    per_layer = 2 * tokens * (4 + 8) * width**2 + 2 * tokens * SIZES.tokens * width
    expected = layers * per_layer // 2
    assert first.work["language"].forward.flops == expected
    head = 2 * tokens * width * SIZES.vocabulary // 2
    assert second.work["language"].forward.flops == expected + head
    assert first.work["language"].recompute.flops == expected
    # Of the tokens' embedding no gradient is a product, and attention computes its scores again.
    assert second.work["language"].backward.flops >= 2 * (expected + head)


def test_messages_are_named_by_axis_and_edge(
    estimated: tuple[RankEstimate, ...],
) -> None:
    images, first, second = estimated
    sent = {message.over: message for message in images.work["images"].forward.messages}
    assert sent["images -> language"].bytes == SIZES.samples_per_microbatch * SIZES.tokens_per_image * SIZES.hidden * 4
    back = {message.over for message in first.work["language"].backward.messages}
    assert back >= {"tp of language", "images -> language, backward"}
    assert {message.over for message in second.work["language"].backward.messages} >= {
        "language stage 0 -> 1, backward"
    }


def test_stages_of_an_encoder_tell_each_other_shapes() -> None:
    layout = {"images": ModuleParallelism(dp=1, pp=2), "language": ModuleParallelism(dp=1)}
    first, second, _ = estimate(layout, layers=2)
    sent = {message.over: message for message in first.work["images"].forward.messages}
    patches = SIZES.samples_per_microbatch * 64  # of 32 x 32 pixels, 4 x 4 each
    assert sent["images stage 0 -> 1"].bytes >= patches * SIZES.hidden * 4
    assert "images -> language" in {message.over for message in second.work["images"].forward.messages}
    back = {message.over for message in second.work["images"].backward.messages}
    assert "images stage 0 -> 1, backward" in back


def test_few_microbatches_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1, pp=2)}
    few = estimate(modules, layers=2, num_microbatches=12)
    monkeypatch.setattr(rank_step, "_until_steady", lambda settings, rank: settings.num_microbatches)
    for one, other in zip(few, estimate(modules, layers=2, num_microbatches=12), strict=True):
        assert one.peak_at == other.peak_at
        assert one.memory.total == pytest.approx(other.memory.total, rel=1e-4)  # losses of all microbatches are kept


def test_the_process_is_left_as_it_was(estimated: tuple[RankEstimate, ...]) -> None:
    assert estimated
    assert not torch.distributed.is_initialized()
    assert type(torch.empty(2)) is torch.Tensor

"""Rotary positions of a sample's own: those of megatron-core's multimodal ones with the same position in all rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import (
    MultimodalRotaryEmbedding,
    RotaryEmbedding,
)

from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.mimo.positions import follow_positions


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    with megatron_on_cpu():
        yield


class Language(torch.nn.Module):
    def __init__(self, rotary: torch.nn.Module | None) -> None:
        super().__init__()
        if rotary is not None:
            self.rotary_pos_emb = rotary


@pytest.mark.parametrize("options", [{}, {"rope_scaling": True}, {"seq_len_interpolation_factor": 2.0}], ids=str)
def test_positions_that_count_from_0_are_the_usual_ones(options: dict[str, object]) -> None:
    rotary = RotaryEmbedding(kv_channels=8, rotary_percent=1.0, **options)
    usual = rotary(5)
    places = follow_positions(Language(rotary))
    assert places is not None
    assert torch.equal(rotary(5), usual)
    places.positions = torch.arange(5).expand(3, 5)
    angles = rotary(5)
    assert angles.shape == (5, 3, 1, 8)
    assert torch.equal(angles, usual.expand(5, 3, 1, 8))


def test_other_positions_are_those_of_a_multimodal_embedding_with_equal_rows() -> None:
    positions = torch.tensor([[0, 1, 2, 2, 9], [3, 0, 1, 40, 41]])
    rotary = RotaryEmbedding(kv_channels=8, rotary_percent=1.0)
    places = follow_positions(Language(rotary))
    assert places is not None
    places.positions = positions
    in_space = MultimodalRotaryEmbedding(kv_channels=8, rotary_percent=1.0)(positions.expand(3, 2, 5), [1, 2, 1])
    assert torch.equal(rotary(5), in_space)
    places.positions = None
    assert rotary(5).shape == (5, 1, 1, 8)


@pytest.mark.parametrize("options", [{}, {"seq_len_interpolation_factor": 2.0}], ids=str)
def test_multimodal_positions_are_not_multiplied_as_matrices(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = torch.randint(0, 30000, (3, 2, 5), generator=torch.Generator().manual_seed(0))
    rotary = MultimodalRotaryEmbedding(kv_channels=8, rotary_percent=1.0, **options)
    theirs = rotary(positions, [1, 2, 1])
    assert follow_positions(Language(rotary)) is None
    assert torch.equal(rotary(positions, [1, 2, 1]), theirs)
    # What TF32 makes of the matrix product.
    exact = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: exact(a.bfloat16(), b.bfloat16()).float())
    assert torch.equal(rotary(positions, [1, 2, 1]), theirs)


def test_nothing_is_done_where_there_are_no_rotary_positions() -> None:
    assert follow_positions(Language(None)) is None
    assert follow_positions(Language(MultimodalRotaryEmbedding(kv_channels=8, rotary_percent=1.0))) is None

"""Text and embeddings are put together as megatron-core's MimoModel does it, without a search on the device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.mimo import MimoModel

from lightning_mimo.microbatch import combine, token_order

PLACEHOLDERS = {"images": 3, "sounds": 7}
HIDDEN = 2

tokens = st.integers(min_value=1, max_value=8).flatmap(
    lambda length: st.lists(st.lists(st.integers(0, 8), min_size=length, max_size=length), min_size=1, max_size=4)
)


@given(tokens)
def test_as_upstream_combines(rows: list[list[int]]) -> None:
    input_ids = torch.tensor(rows)
    kinds = {"text": ~torch.isin(input_ids, torch.tensor(list(PLACEHOLDERS.values())))}
    kinds |= {name: input_ids == token for name, token in PLACEHOLDERS.items()}
    generator = torch.Generator().manual_seed(1)
    made = {name: torch.rand(int(where.sum()), HIDDEN, generator=generator) for name, where in kinds.items()}
    order = token_order(input_ids, PLACEHOLDERS)
    expected = MimoModel.align_embeddings_by_token_positions(None, made, input_ids, PLACEHOLDERS)
    assert torch.equal(combine(list(made.values()), order, input_ids.shape), expected)
    assert torch.equal(input_ids.flatten()[order.text], input_ids[kinds["text"]])


def test_every_embedding_gets_its_gradient() -> None:
    input_ids = torch.tensor([[1, 3, 3], [3, 2, 1]])
    text = torch.zeros(3, HIDDEN, requires_grad=True)
    images = torch.zeros(3, HIDDEN, requires_grad=True)
    combined = combine([text, images], token_order(input_ids, {"images": 3}), input_ids.shape)
    weights = torch.arange(6.0).view(2, 3)  # by sample and token
    (combined * weights.t().unsqueeze(-1)).sum().backward()
    assert text.grad[:, 0].tolist() == [0, 4, 5]
    assert images.grad[:, 0].tolist() == [1, 2, 3]


def test_wrong_number_of_embeddings_is_refused() -> None:
    input_ids = torch.tensor([[1, 3], [3, 2]])
    with pytest.raises(ValueError, match=r"2 \* 2 = 4 places, but there are 2 \+ 1 = 3 embeddings"):
        combine([torch.zeros(2, 1), torch.zeros(1, 1)], token_order(input_ids, {"images": 3}), input_ids.shape)

"""Losses and predictions from a divided vocabulary are those from a whole one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.layers.vocab_parallel import greedy_tokens, token_losses
from tests.support.rank_pool import RankPool

SAMPLES, LENGTH, VOCABULARY = 3, 5, 12
OUTSIDE = -100


def whole(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = (4 * torch.randn(SAMPLES, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    weights = torch.rand(SAMPLES, LENGTH, generator=generator)
    return logits, labels, weights


def expected(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By torch, in one process and in float64: losses, and what their weighted sum does to the logits."""
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact.transpose(1, 2), labels, ignore_index=OUTSIDE, reduction="none")
    (losses * weights).sum().backward()
    return losses.detach(), exact.grad


def divided_losses(dtype: torch.dtype) -> dict[str, float]:
    """Largest differences from one process."""
    logits, labels, weights = whole(dtype)
    labels[1, 2], labels[0, 0] = OUTSIDE, VOCABULARY
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    part = logits.chunk(size, dim=-1)[rank].clone().requires_grad_()
    losses = token_losses(part, labels, group)
    (losses * weights).sum().backward()
    labels[0, 0] = OUTSIDE
    right, gradient = expected(logits, labels, weights)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert part.grad.dtype == dtype
    assert losses[1, 2] == losses[0, 0] == 0.0
    return {
        "loss": float((losses.detach() - right).abs().max()),
        "gradient": float((part.grad - gradient.chunk(size, dim=-1)[rank]).abs().max()),
    }


def losses_of_a_padded_vocabulary() -> bool:
    """Whether the last third of the vocabulary, which is never meant, may have logits of -inf."""
    logits, labels, weights = whole(torch.float32)
    used = VOCABULARY * 2 // 3
    logits[..., used:], labels = -torch.inf, labels % used
    part = logits.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].clone().requires_grad_()
    losses = token_losses(part, labels, dist.group.WORLD)
    (losses * weights).sum().backward()
    right, gradient = expected(logits, labels, weights)
    gradient = gradient.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()]
    return all(
        torch.allclose(found.double(), wanted, atol=5e-6) for found, wanted in ((losses, right), (part.grad, gradient))
    )


def difference_from_upstream() -> float:
    logits, labels, _ = whole(torch.float32)
    part = logits.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].contiguous()
    with megatron_on_cpu():
        theirs = vocab_parallel_cross_entropy(part.clone(), labels, tp_group=dist.group.WORLD)
    return float((token_losses(part, labels, dist.group.WORLD) - theirs).abs().max())


def collectives_of_a_loss() -> int:
    logits, labels, _ = whole(torch.float32)
    part = logits.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].contiguous()
    before = dist.group.WORLD._get_backend(torch.device("cpu"))._get_sequence_number_for_group()
    token_losses(part.requires_grad_(), labels, dist.group.WORLD).sum().backward()
    return dist.group.WORLD._get_backend(torch.device("cpu"))._get_sequence_number_for_group() - before


def divided_predictions() -> tuple[list[int], list[int]]:
    """Where the whole vocabulary says 9, then 2 and 8 alike, then 8, which is not to be chosen."""
    logits = torch.zeros(3, VOCABULARY, dtype=torch.bfloat16)
    logits[0, 9] = logits[1, 2] = logits[1, 8] = logits[2, 8] = 1.0
    part = logits.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()]
    return greedy_tokens(part, dist.group.WORLD).tolist(), greedy_tokens(part, dist.group.WORLD, without=[8]).tolist()


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float64, 1e-14), (torch.float32, 5e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_losses_and_gradients(rank_pool: RankPool, ranks: int, dtype: torch.dtype, precision: float) -> None:
    for found in rank_pool.run(divided_losses, dtype, world_size=ranks):
        assert found["loss"] < min(precision, 5e-6)  # the logits are what they are; no rounding comes after them
        assert found["gradient"] < precision


@pytest.mark.parametrize("ranks", [1, 3])
def test_vocabulary_may_be_padded(rank_pool: RankPool, ranks: int) -> None:
    assert all(rank_pool.run(losses_of_a_padded_vocabulary, world_size=ranks))


def test_as_megatron_computes_it(rank_pool: RankPool) -> None:
    assert max(rank_pool.run(difference_from_upstream, world_size=2)) < 5e-6


def test_one_collective_and_none_for_one_rank(rank_pool: RankPool) -> None:
    assert rank_pool.run(collectives_of_a_loss, world_size=1) == [0]
    assert rank_pool.run(collectives_of_a_loss, world_size=2) == [1, 1]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_predictions(rank_pool: RankPool, ranks: int) -> None:
    for tokens, without in rank_pool.run(divided_predictions, world_size=ranks):
        assert tokens == [9, 2, 8]
        assert without == [9, 2, 0]

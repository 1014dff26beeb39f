"""Losses and greedy predictions from logits whose vocabulary is sharded over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from lightning_mimo.microbatch import Microbatch, sum_by_sample
from lightning_mimo.parallel.host_copies import to_device

_IGNORED = -100  # label that torch's cross_entropy ignores


def token_losses(logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Cross-entropy of every token. Collective over the tensor-parallel group.

    One collective exchanges each rank's log-sum-exp and the logit of the label. megatron-core's function needs three,
    also with a single rank, and rounds float64 to float32.

    Args:
        logits: ``[b, s, vocabulary / tp]``, the shard of this rank.
        labels: int64 ``[b, s]``, ids in the full vocabulary. The loss of a label outside the vocabulary is 0.
        group: tensor-parallel group of the language module.

    Returns:
        ``[b, s]``, float64 for float64 logits, otherwise float32.
    """
    inside = (labels >= 0) & (labels < logits.size(-1) * group.size())
    if group.size() > 1:
        return _TokenLosses.apply(logits, labels, inside, group)
    precise = logits.to(_precise(logits)).flatten(0, 1)
    labels_or_none = torch.where(inside, labels, _IGNORED).flatten()
    return cross_entropy(precise, labels_or_none, ignore_index=_IGNORED, reduction="none").view_as(labels)


class _TokenLosses(torch.autograd.Function):
    """Computes log(sum(exp(logits))) - logits[label]; the gradient is softmax(logits) minus 1 at the label."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, inside: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        precise = logits.to(_precise(logits))
        local = labels - group.rank() * logits.size(-1)
        mine = (local >= 0) & (local < logits.size(-1))
        local = torch.where(mine, local, 0).unsqueeze(-1)
        wanted = torch.where(mine, precise.gather(-1, local).squeeze(-1), 0)  # a logit may be -inf
        parts, wanted_parts = _gather(torch.stack([precise.logsumexp(dim=-1), wanted]), group).unbind(dim=1)
        total = parts.logsumexp(dim=0)
        ctx.save_for_backward(logits, total, local, mine, inside)
        return (total - wanted_parts.sum(dim=0)) * inside

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, total, local, mine, inside = ctx.saved_tensors
        gradient = (gradient * inside).unsqueeze(-1)
        probabilities = (logits.to(total.dtype) - total.unsqueeze(-1)).exp_()
        at_logits = probabilities.mul_(gradient).scatter_add_(-1, local, -gradient * mine.unsqueeze(-1))
        return at_logits.to(logits.dtype), None, None, None


def exact_matches(
    logits: torch.Tensor, batch: Microbatch, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of samples whose counted tokens are all the most likely ones, and number of samples with counted tokens.

    Collective over the tensor-parallel group.

    Args:
        logits: ``[b, s, vocabulary / tp]``, the shard of this rank.
        batch: the microbatch, with labels and loss_mask.
        group: tensor-parallel group of the language module.
    """
    counted = batch["loss_mask"] > 0
    wrong = (greedy_tokens(logits, group) != batch["labels"]) & counted
    asked = sum_by_sample(counted, batch) > 0
    return (asked & (sum_by_sample(wrong, batch) == 0)).sum(), asked.sum()


@torch.no_grad()
def greedy_tokens(logits: torch.Tensor, group: dist.ProcessGroup, *, without: Collection[int] = ()) -> torch.Tensor:
    """Most likely token at each position; of several, the one with the lowest id.

    Collective over the tensor-parallel group.

    Args:
        logits: ``[..., vocabulary / tp]``, the shard of this rank.
        group: tensor-parallel group of the language module.
        without: token ids that must not be chosen.

    Returns:
        int64 ``[...]``, the same on all ranks of the group.
    """
    first = group.rank() * logits.size(-1)
    if mine := [token - first for token in without if first <= token < first + logits.size(-1)]:
        logits = logits.index_fill(-1, to_device(torch.tensor(mine, device="cpu"), logits.device), -torch.inf)
    best, local = logits.max(dim=-1)
    if group.size() == 1:
        return local
    # float64 represents every token id exactly, and every logit of a smaller dtype.
    all_best, all_tokens = _gather(torch.stack([best.double(), (local + first).double()]), group).unbind(dim=1)
    winner = all_best.argmax(dim=0, keepdim=True)
    return all_tokens.gather(0, winner).squeeze(0).long()


def _precise(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _gather(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather values of all ranks: ``[...] -> [tp, ...]``. Sent flat, as gloo only concatenates the first dimension."""
    gathered = values.new_empty(group.size() * values.numel())
    dist.all_gather_into_tensor(gathered, values.flatten(), group=group)
    return gathered.view(group.size(), *values.shape)

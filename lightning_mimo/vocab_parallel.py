"""Losses and predictions from logits whose vocabulary is divided over the tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region, vocab_parallel_cross_entropy


def token_losses(logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Cross-entropy of every token. Collective over the tensor-parallel group.

    Args:
        logits: ``[b, s, vocabulary / tp]``, this rank's part; may be overwritten.
        labels: int64 ``[b, s]``, ids of the whole vocabulary.
        group: the language module's tensor-parallel group.

    Returns:
        ``[b, s]``, float64 for float64 logits, else float32.
    """
    if logits.dtype == torch.float64:  # megatron-core's would round it to float32
        return _token_losses_in_float64(logits, labels, group)
    losses = vocab_parallel_cross_entropy(
        logits.transpose(0, 1).contiguous(), labels.transpose(0, 1).contiguous(), tp_group=group
    )
    return losses.transpose(0, 1)


def _token_losses_in_float64(logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """log(sum(exp(logits))) - logits[label], with both terms summed over the parts of the vocabulary."""
    largest = logits.detach().amax(dim=-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    shifted = logits - largest.unsqueeze(-1)
    local = labels - group.rank() * logits.size(-1)
    mine = (local >= 0) & (local < logits.size(-1))
    wanted = shifted.gather(-1, torch.where(mine, local, 0).unsqueeze(-1)).squeeze(-1) * mine
    total = reduce_from_tensor_model_parallel_region(shifted.exp().sum(dim=-1), group=group)
    return total.log() - reduce_from_tensor_model_parallel_region(wanted, group=group)


@torch.no_grad()
def greedy_tokens(logits: torch.Tensor, group: dist.ProcessGroup, *, without: Collection[int] = ()) -> torch.Tensor:
    """The most likely token everywhere, the lowest id where several are. Collective over the tensor-parallel group.

    Args:
        logits: ``[..., vocabulary / tp]``, this rank's part.
        group: the language module's tensor-parallel group.
        without: tokens that are not to be chosen.

    Returns:
        int64 ``[...]``, the same on all ranks of the group.
    """
    first = group.rank() * logits.size(-1)
    if mine := [token - first for token in without if first <= token < first + logits.size(-1)]:
        logits = logits.index_fill(-1, torch.tensor(mine, device=logits.device), -torch.inf)
    best, local = logits.max(dim=-1)
    tokens = local + first
    all_best, all_tokens = _gather(best, group), _gather(tokens, group)
    winner = all_best.argmax(dim=0, keepdim=True)
    return all_tokens.gather(0, winner).squeeze(0)


def _gather(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``[...] -> [tp, ...]``. Flat on the wire, since gloo only concatenates along the first dimension."""
    gathered = values.new_empty(group.size() * values.numel())
    dist.all_gather_into_tensor(gathered, values.flatten(), group=group)
    return gathered.view(group.size(), *values.shape)

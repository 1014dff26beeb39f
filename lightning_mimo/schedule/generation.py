"""Greedy decoding through the schedule: the answer of every sample of a global batch, on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from lightning_mimo.errors import DataError
from lightning_mimo.layers.vocab_parallel import greedy_tokens
from lightning_mimo.microbatch import Microbatch, TokenOrder, token_order
from lightning_mimo.schedule.forward_backward import ForwardStep, GlobalBatchSchedule


def prompt_lengths(microbatch: Microbatch) -> torch.Tensor:
    """Tokens that are given of each sample: all up to the first one whose label counts, or all of them.

    Args:
        microbatch: with ``lengths`` int64 ``[b]`` and, where there are labels, ``loss_mask`` ``[b, s]``.

    Returns:
        int64 ``[b]``.
    """
    lengths = microbatch["lengths"]
    if "loss_mask" not in microbatch:
        return lengths
    counted = microbatch["loss_mask"] > 0
    return torch.where(counted.any(dim=1), counted.int().argmax(dim=1) + 1, lengths)


@torch.no_grad()
def greedy_decode(
    schedule: GlobalBatchSchedule,
    microbatches: Sequence[Microbatch],
    forward: ForwardStep,
    *,
    global_batch_size: int,
    max_new_tokens: int,
    pad_token_id: int,
    placeholders: Mapping[str, int],
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Write ``max_new_tokens`` tokens for every sample. Collective over the world.

    Without a cache: the prompts grow in place and every token costs one forward pass of the whole batch.

    Args:
        schedule: of the model.
        microbatches: this rank's share; ``input_ids`` are not changed.
        forward: runs the model on one microbatch.
        global_batch_size: samples over all ranks.
        max_new_tokens: tokens to write.
        pad_token_id: stands where nothing is written yet; any text token does.
        placeholders: encoder name -> the token that stands for its embeddings in a prompt. It is never written.
        group: the language module's tensor-parallel group; ``None`` on ranks without it.

    Returns:
        int64 ``[global_batch_size, max_new_tokens]`` by position in the global batch, on every rank.

    Raises:
        DataError: if a placeholder comes after the prompt.
    """
    for microbatch in microbatches:
        _check_prompts(microbatch, placeholders)
    prompts = [_with_room(microbatch, max_new_tokens, pad_token_id, placeholders) for microbatch in microbatches]
    lengths = [prompt_lengths(microbatch) for microbatch in microbatches]
    device = prompts[0]["input_ids"].device
    written = torch.zeros((global_batch_size, max_new_tokens), dtype=torch.int64, device=device)

    def last_token(logits: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
        assert group is not None, "it is called where the loss is computed"
        last = microbatch["prompt_lengths"] + step - 1
        rows = torch.arange(len(last), device=device)
        return greedy_tokens(logits[rows, last], group, without=placeholders.values())

    for prompt, length in zip(prompts, lengths, strict=True):
        prompt["prompt_lengths"] = length
    for step in range(max_new_tokens):
        tokens = schedule.predict(prompts, forward, last_token)
        if schedule.counts_loss:
            for prompt, token in zip(prompts, tokens, strict=True):
                written[list(prompt["global_positions"]), step] = token
        column = written[:, step].contiguous()
        dist.all_reduce(column)
        written[:, step] = column
        for prompt in prompts:
            rows = torch.arange(len(prompt["prompt_lengths"]), device=device)
            prompt["input_ids"][rows, prompt["prompt_lengths"] + step] = column[list(prompt["global_positions"])]
    return written


def gather_indices(microbatches: Sequence[Microbatch], *, global_batch_size: int, device: torch.device) -> list[int]:
    """Dataset index at every position of a global batch, -1 for padding. Collective over the world.

    Args:
        microbatches: this rank's share.
        global_batch_size: samples over all ranks.
        device: where collectives take place.
    """
    indices = torch.full((global_batch_size,), -1, device=device)
    for microbatch in microbatches:
        for position, index, is_padding in zip(
            microbatch["global_positions"], microbatch["sample_indices"], microbatch["is_padding"], strict=True
        ):
            indices[position] = -1 if is_padding else index
    dist.all_reduce(indices, op=dist.ReduceOp.MAX)
    return indices.tolist()


def _check_prompts(microbatch: Microbatch, placeholders: Mapping[str, int]) -> None:
    text = microbatch["input_ids"]
    after = torch.arange(text.size(1), device=text.device) >= prompt_lengths(microbatch).unsqueeze(1)
    for name, token in placeholders.items():
        rows = ((text == token) & after).any(dim=1).nonzero().flatten().tolist()
        if rows:
            raise DataError(
                f"Sample {microbatch['sample_indices'][rows[0]]}: a placeholder of {name!r} (token {token}) comes "
                f"after the first token whose loss_mask is not 0. An answer is written after the tokens before that "
                f"one, so they must hold all placeholders."
            )


def _with_room(microbatch: Microbatch, columns: int, pad_token_id: int, placeholders: Mapping[str, int]) -> Microbatch:
    """A copy whose sequences are longer by ``columns``; what stands there comes after all that is read."""
    input_ids = torch.nn.functional.pad(microbatch["input_ids"], (0, columns), value=pad_token_id)
    positions = torch.arange(input_ids.size(1), device=input_ids.device).expand_as(input_ids)
    # Only text is written, and no placeholder comes behind the prompt: the order stays.
    order = TokenOrder(*(each.to(input_ids.device) for each in token_order(input_ids.cpu(), placeholders)))
    return {**microbatch, "input_ids": input_ids, "position_ids": positions, "token_order": order}

"""Where text and the embeddings of encoders go in a microbatch, known from its tokens before it reaches the device.

megatron-core's MimoModel looks for placeholders on the device, and the host waits for what it finds, several times in
every forward pass. Here a worker of the DataLoader has looked already, and one gather puts everything in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch


class TokenOrder(NamedTuple):
    """The order of the embeddings of a microbatch ``[b, s]``. Plain tensors, so that every loader can move it.

    Attributes:
        text: int64 ``[n]``, the places of text tokens, ``row * s + column``, in ascending order.
        rows: int64 ``[s * b]``, for every place of the combined ``[s, b, hidden]`` the number of its embedding, counted
            over those of text and then those of every encoder, each in the order of its places in ``[b, s]``.
    """

    text: torch.Tensor
    rows: torch.Tensor


def token_order(input_ids: torch.Tensor, placeholders: Mapping[str, int]) -> TokenOrder:
    """The order of a microbatch, by numpy: of small arrays, which these are, that is several times faster.

    Args:
        input_ids: int64 ``[b, s]`` on the CPU.
        placeholders: encoder name -> the token that stands for one of its embeddings.
    """
    tokens = input_ids.numpy()
    kinds = np.zeros(tokens.shape, dtype=np.int8)
    for kind, token in enumerate(placeholders.values(), start=1):
        kinds[tokens == token] = kind
    places = kinds.ravel().argsort(kind="stable")
    numbers = np.empty_like(places)
    numbers[places] = np.arange(places.size)
    text = places[: places.size - np.count_nonzero(kinds)]
    rows = numbers.reshape(tokens.shape).T.ravel()
    return TokenOrder(text=torch.from_numpy(text), rows=torch.from_numpy(rows))


def combine(embeddings: Sequence[torch.Tensor], order: TokenOrder, shape: torch.Size) -> torch.Tensor:
    """Put all embeddings in their places. The host does not wait for the device.

    Args:
        embeddings: ``[rows, hidden]`` of text, then of every encoder, in the order of the placeholders.
        order: of the microbatch.
        shape: of the microbatch, ``[b, s]``.

    Returns:
        ``[s, b, hidden]``.

    Raises:
        ValueError: if there are more or fewer embeddings than tokens.
    """
    together = torch.cat(list(embeddings))
    samples, length = shape
    if len(together) != samples * length:
        raise ValueError(
            f"A microbatch of {samples} samples and {length} tokens has {samples} * {length} = {samples * length} "
            f"places, but there are {' + '.join(str(len(each)) for each in embeddings)} = {len(together)} embeddings "
            f"(of text, then of each encoder). One embedding must come for each placeholder token."
        )
    return together.index_select(0, order.rows).view(length, samples, -1)

"""What every layer passes on: one microbatch, how many embeddings each sample gets, and where they go in the text.

megatron-core's MimoModel looks for placeholder tokens on the device, and the host waits for what it finds, several
times in every forward pass. Here a worker of the DataLoader has looked already, and one gather puts every embedding in
its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
import torch

from lightning_mimo.errors import DataError


class Microbatch(TypedDict, total=False):
    """One rank's share of one microbatch: ``b`` samples of the rank's language replica, padded to ``s`` tokens.

    Ranks of encoders hold the text as well: both sides of a bridge know from it how many embeddings to expect.

    Attributes:
        input_ids: int64 ``[b, s]``.
        position_ids: int64 ``[b, s]``.
        labels: int64 ``[b, s]``, the token to predict at each position; ranks of the language module only.
        loss_mask: ``[b, s]``, 0 where a position counts for nothing; ranks of the language module only.
        token_order: where text and embeddings go; ranks of the language module only.
        lengths: int64 ``[b]``, tokens of each sample before padding.
        placeholders: encoder module -> placeholder tokens of each sample, ``b`` numbers.
        sample_indices: index in the dataset of each sample.
        global_positions: position in the global batch of each sample.
        is_padding: whether each sample only fills up a short last batch and counts for nothing.
        modality_inputs: module -> ``{encoder: {argument: [items, ...]}}`` of the samples that this rank encodes;
            ``None`` where no sample has any.
        modality_counts: module -> embeddings of each sample that the bridge of this rank sees.
        sample_fingerprints: module -> int64 ``[n, 3]``, position, index and text checksum of this rank's samples.
        prompt_lengths: int64 ``[b]``, tokens of each sample before its answer; while one is generated only.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    token_order: TokenOrder
    lengths: torch.Tensor
    placeholders: Mapping[str, tuple[int, ...]]
    sample_indices: tuple[int, ...]
    global_positions: tuple[int, ...]
    is_padding: tuple[bool, ...]
    modality_inputs: dict[str, dict[str, dict[str, torch.Tensor]] | None]
    modality_counts: dict[str, ModalityCounts]
    sample_fingerprints: dict[str, torch.Tensor]
    prompt_lengths: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ModalityCounts:
    """How many embeddings each sample of a microbatch is to get from one encoder. Plain numbers, no tensors.

    Attributes:
        sample_indices: index in the dataset of every sample that the bridge of this rank sees.
        placeholders: placeholder tokens in each of these samples, the number of embeddings it must get.
        own: which of these samples this rank's encoder replica encodes.
        items: images, clips, … of each of the encoder's own samples. Later pipeline stages of an encoder, which load
            none, are told them with the first activations.
    """

    sample_indices: tuple[int, ...]
    placeholders: tuple[int, ...]
    own: range
    items: tuple[int, ...]

    @property
    def own_placeholders(self) -> tuple[int, ...]:
        return self.placeholders[self.own.start : self.own.stop]

    def to(self, *args: object, **kwargs: object) -> ModalityCounts:
        """Itself: Lightning moves whatever has ``to`` and would refuse a frozen dataclass without it."""
        return self

    def check_rows(self, module: str, rows: int, *, uniform: bool) -> None:
        """Check the encoder's output against the placeholders.

        Args:
            module: name of the encoder, for the message.
            rows: embeddings that the encoder made for its own samples together.
            uniform: whether it makes the same number of every item, so that each sample can be checked; else only the
                sum can.

        Raises:
            DataError: naming the first sample whose numbers differ, or all samples where only the sum is known.
        """
        per_item = rows // sum(self.items) if sum(self.items) else 0
        indices = self.sample_indices[self.own.start : self.own.stop]
        for index, placeholders, items in zip(indices, self.own_placeholders, self.items, strict=True):
            if uniform and placeholders != items * per_item:
                raise DataError(
                    f"Sample {index}: input_ids has {placeholders} placeholder tokens for {module!r}, but its {items} "
                    f"inputs give {items * per_item} embeddings ({per_item} each). Write {items * per_item} "
                    f"placeholder tokens into this sample, or give it as many inputs as it has placeholders for."
                )
        if rows != sum(self.own_placeholders):
            raise DataError(
                f"Samples {list(indices)}: input_ids has {sum(self.own_placeholders)} placeholder tokens for "
                f"{module!r}, but the encoder made {rows} embeddings. One placeholder must stand for each embedding."
            )


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
        DataError: if there are more or fewer embeddings than tokens.
    """
    together = torch.cat(list(embeddings))
    samples, length = shape
    if len(together) != samples * length:
        raise DataError(
            f"A microbatch of {samples} samples and {length} tokens has {samples} * {length} = {samples * length} "
            f"places, but there are {' + '.join(str(len(each)) for each in embeddings)} = {len(together)} embeddings "
            f"(of text, then of each encoder). One embedding must come for each placeholder token."
        )
    return together.index_select(0, order.rows).view(length, samples, -1)

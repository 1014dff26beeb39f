"""Types shared by all folders: a microbatch, the number of embeddings per sample, and their positions in the text.

megatron-core's MimoModel searches for placeholder tokens on the device, and the host waits for the result several
times per forward pass. Here a DataLoader worker has searched already, and a single gather places all embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import NamedTuple, TypedDict

import numpy as np
import torch

from lightning_mimo.errors import DataError

_UNKNOWN = -1


class Ragged(NamedTuple):
    """An argument of an encoder whose items differ in their first dimension.

    In a sample, it holds the items of that sample. The encoder receives one that holds all items of the microbatch.
    An encoder that returns ``[rows, hidden]`` makes one embedding of every row, unless it declares otherwise
    (``lightning_mimo.ItemSizes``).

    Example: two clips of 3 and 1 frames with 5 features each::

        Ragged(values=torch.rand(4, 5), lengths=torch.tensor([3, 1]))

    Attributes:
        values: ``[rows, ...]``, the rows of all items, concatenated.
        lengths: int64 ``[items]``, number of rows of each item; the sum is ``rows``.
    """

    values: torch.Tensor
    lengths: torch.Tensor


class Microbatch(TypedDict, total=False):
    """One rank's share of one microbatch: ``b`` samples of the rank's language replica, padded to ``s`` tokens.

    With ``MimoStrategy(pack_to=...)`` the microbatch is packed: all its samples follow each other in one row, without
    padding. Tensors ``[b, s]`` then are ``[1, s]``, ``s`` being the sum of the samples' lengths, and everything that
    there is of each sample has ``n`` entries, the number of samples; without packing, ``n`` is ``b``.

    Ranks of encoders hold the text, too, because both sides of a bridge compute the number of embeddings from it.

    Attributes:
        input_ids: int64 ``[b, s]``.
        position_ids: int64 ``[b, s]``; ``[3, b, s]`` for a language module with multimodal rotary positions.
        custom_positions: whether ``position_ids`` differ from 0, 1, 2, …, as they do where packed samples follow each
            other; ranks of the language module only.
        labels: int64 ``[b, s]``, the token to predict at each position, -100 for none; ranks of the language module
            only.
        loss_mask: float ``[b, s]``, 0 at positions that do not count in the loss; ranks of the language module only.
        token_order: positions of text tokens and embeddings; ranks of the language module only.
        lengths: int64 ``[n]``, tokens of each sample before padding.
        sample_lengths: the same as integers, on the host.
        is_packed: whether the samples follow each other in one row.
        placeholders: encoder module -> number of placeholder tokens at each position of the global batch, which is one
            sample or, packed, one row of samples.
        sample_indices: index in the dataset of each sample.
        global_positions: position in the global batch of each sample, as the sampler ordered it.
        is_padding: whether each sample only pads an incomplete last batch and does not count.
        modality_inputs: module -> ``{encoder: {argument: [items, ...]}}`` of the samples that this rank encodes;
            ``None`` where no sample has any.
        modality_counts: module -> embeddings of each sample that the bridge of this rank sees.
        sample_fingerprints: module -> int64 ``[n, 5]`` of numpy, which stays on the host: position, place in the row,
            index, checksum of the text, and checksum of what else the module takes of each sample.
        prompt_lengths: int64 ``[b]``, tokens of each sample before its answer; while one is generated only.

    On ranks of the language module, the ``extra_keys`` of :class:`MimoModule` are added to these.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    custom_positions: bool
    labels: torch.Tensor
    loss_mask: torch.Tensor
    token_order: TokenOrder
    lengths: torch.Tensor
    sample_lengths: tuple[int, ...]
    is_packed: bool
    placeholders: Mapping[str, tuple[int, ...]]
    sample_indices: tuple[int, ...]
    global_positions: tuple[int, ...]
    is_padding: tuple[bool, ...]
    modality_inputs: dict[str, dict[str, dict[str, torch.Tensor | Ragged]] | None]
    modality_counts: dict[str, ModalityCounts]
    sample_fingerprints: dict[str, np.ndarray]
    prompt_lengths: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ModalityCounts:
    """Number of embeddings that each sample of a microbatch gets from one encoder. Plain integers, no tensors.

    Attributes:
        sample_indices: index in the dataset of every sample that the bridge of this rank handles.
        placeholders: number of placeholder tokens in each of these samples, equal to the embeddings it must get.
        samples_per_position: how many of these samples are at each position of the global batch; more than one only
            where rows are packed.
        own: which of these samples this rank's encoder replica encodes.
        items: number of images, clips, … in each of the encoder's own samples. Later pipeline stages of an encoder load
            no items and receive these numbers with the first activations.
        embeddings: number of embeddings that the encoder declares for each of its own samples; ``None`` if it declares
            nothing.
        rows: ``encoder.argument`` -> first dimension of the argument in each of the encoder's own samples.
        per_item: arguments that later pipeline stages receive, too -> their integers, one row per item; empty on a
            later stage until it has received them.
    """

    sample_indices: tuple[int, ...]
    placeholders: tuple[int, ...]
    samples_per_position: tuple[int, ...]
    own: range
    items: tuple[int, ...]
    embeddings: tuple[int, ...] | None = None
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    per_item: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    @property
    def placeholders_per_position(self) -> tuple[int, ...]:
        """Placeholder tokens at each position of the global batch. A bridge divides between positions."""
        each = iter(self.placeholders)
        return tuple(sum(islice(each, samples)) for samples in self.samples_per_position)

    @property
    def own_placeholders(self) -> tuple[int, ...]:
        return self.placeholders[self.own.start : self.own.stop]

    @property
    def own_indices(self) -> tuple[int, ...]:
        return self.sample_indices[self.own.start : self.own.stop]

    def to(self, *args: object, **kwargs: object) -> ModalityCounts:
        """Return ``self``. Lightning calls ``to`` to move a batch, and rejects a frozen dataclass without it."""
        return self

    def to_tell(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Integers for the next pipeline stage, which loads no items.

        Returns:
            Items and embeddings, whose number the next stage knows; and ``per_item``, whose number it does not know.
        """
        embeddings = self.embeddings or [_UNKNOWN] * len(self.items)
        more = [(len(rows[0]) if rows else 0, *chain.from_iterable(rows)) for rows in self.per_item.values()]
        return (*self.items, *embeddings), tuple(chain.from_iterable(more))

    def told(self, numbers: tuple[int, ...], more: tuple[int, ...]) -> ModalityCounts:
        """A copy of these counts that contains the result of :meth:`to_tell` on the previous stage."""
        items, embeddings = numbers[: len(self.items)], numbers[len(self.items) :]
        left, per_item = iter(more), {}
        for name in self.per_item:
            width = next(left)
            per_item[name] = tuple(tuple(islice(left, width)) for _ in range(sum(items)))
        return replace(self, items=items, embeddings=None if _UNKNOWN in embeddings else embeddings, per_item=per_item)

    def check_rows(self, module: str, rows: int, *, uniform: bool) -> None:
        """Check the encoder's output against the placeholders, sample by sample.

        Args:
            module: name of the encoder, for the message.
            rows: total number of embeddings that the encoder returned for its own samples.
            uniform: whether it returned ``[items, tokens, hidden]``, that is, equally many embeddings per item.

        Raises:
            DataError: naming the first sample whose numbers differ; or if the encoder returned ``[rows, hidden]`` and
                does not declare which rows belong to which sample.
        """
        made, explained = self._made(module, rows, uniform=uniform)
        for index, placeholders, items, embeddings in zip(
            self.own_indices, self.own_placeholders, self.items, made, strict=True
        ):
            if placeholders != embeddings:
                raise DataError(
                    f"Sample {index}: input_ids has {placeholders} placeholder tokens for {module!r}, but its {items} "
                    f"inputs give {embeddings} embeddings{explained}. Write {embeddings} placeholder tokens into this "
                    f"sample, or give it as many inputs as it has placeholders for."
                )
        if rows != sum(made):
            raise DataError(
                f"Samples {list(self.own_indices)}: the encoder of {module!r} made {rows} embeddings, but its inputs "
                f"are declared to give {' + '.join(map(str, made))} = {sum(made)}. Let the encoder return one row for "
                f"each, or correct its item_sizes."
            )

    def _made(self, module: str, rows: int, *, uniform: bool) -> tuple[Sequence[int], str]:
        """Number of embeddings of each of the encoder's own samples, and an explanation for error messages."""
        items = sum(self.items)
        if uniform or items == 0:
            per_item = rows // items if items else 0
            return [each * per_item for each in self.items], f" ({per_item} each)" if items else ""
        if self.embeddings is not None:
            return self.embeddings, ""
        if rows == items:
            return self.items, " (1 each)"
        raise DataError(
            f"Module {module!r}: the encoder returned {rows} rows for {items} items, [rows, hidden], so it is unknown "
            f"which rows belong to which sample. Return [items, tokens, hidden]; or declare how many embeddings each "
            f"item gives: item_sizes = lightning_mimo.ItemSizes(embeddings=...) in the encoder's class."
        )


class TokenOrder(NamedTuple):
    """The order of the embeddings of a microbatch ``[b, s]``. Plain tensors, so that any loader can move them.

    Attributes:
        text: int64 ``[n]``, flat positions of text tokens, ``row * s + column``, in ascending order.
        rows: int64 ``[s * b]``, for every position of the combined ``[s, b, hidden]`` the row of its embedding in the
            concatenation of text and all encoders. Each of these is in the order of its positions in ``[b, s]``.
    """

    text: torch.Tensor
    rows: torch.Tensor


def sum_by_sample(values: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
    """Sum values of tokens over each sample, in a packed microbatch or not. The host does not wait for the device.

    Example, in ``loss()``, for a mean over the tokens of each sample::

        losses = sum_by_sample(token_losses * batch["loss_mask"], batch)  # [n]

    Args:
        values: numbers ``[b, s]``, one for each token; bools are counted.
        microbatch: with ``is_packed`` and ``lengths``.

    Returns:
        ``[n]``, in the order of ``sample_indices``.
    """
    if values.dtype == torch.bool:
        values = values.long()
    if not microbatch["is_packed"]:
        return values.sum(dim=1)
    lengths = microbatch["lengths"]
    samples = torch.arange(len(lengths), device=lengths.device)
    samples = samples.repeat_interleave(lengths, output_size=values.size(1))
    return values.new_zeros(len(lengths)).index_add(0, samples, values[0])


def token_order(input_ids: torch.Tensor, placeholders: Mapping[str, int]) -> TokenOrder:
    """Compute the order of a microbatch, with numpy, which is several times faster than torch for small arrays.

    Args:
        input_ids: int64 ``[b, s]`` on the CPU.
        placeholders: encoder name -> id of the token that stands for one of its embeddings.
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
    """Combine the embeddings of text and encoders in token order. The host does not wait for the device.

    Args:
        embeddings: ``[rows, hidden]`` of text, then of every encoder, in the order of the placeholders.
        order: order of the microbatch.
        shape: shape of the microbatch, ``[b, s]``.

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
            f"(of text, then of each encoder). Each placeholder token needs exactly one embedding."
        )
    return together.index_select(0, order.rows).view(length, samples, -1)

"""NCCL communicators that a rank needs, in an order in which all ranks can make them. No torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import DENSE_AXES, EXPERT_AXES, LANGUAGE, ResolvedParallelism
from lightning_mimo.layout.routes import routes_between

Use = Literal["model", "gradients", "expert gradients", "activations sent", "gradients sent", "announcements"]
"""What a process group is used for. Groups with the same use may be shared, because all ranks call them in the same
order. Different uses need separate groups, because their order differs between ranks:

- Gradient reductions overlap with the collectives of the model. They start at different times on different ranks if
  some replicas have no images.
- Gradient reductions of experts overlap with those of dense parameters in the same way.
- Transfers between pipeline stages have an order of their own in each direction.
- Announcements of shapes are exchanged by the hosts, with gloo on any device.
"""
SENT: tuple[Use, Use] = ("activations sent", "gradients sent")
"""Uses whose groups hold all ranks, and have a communicator for every pair of ranks that exchange tensors."""

_MIB = 2**20
_BYTES_OF_PAIR, _BYTES_OF_MORE = 544 * _MIB, 688 * _MIB


@dataclass(frozen=True, kw_only=True, order=True)
class Communicator:
    """One NCCL communicator.

    Attributes:
        ranks: global ranks, ascending.
        module: module that it serves; empty if it serves all, or the transfers between ranks.
        use: use of its process group; ``world`` is the default group, ``bridge`` that of a bridge on shared ranks.
    """

    ranks: tuple[int, ...]
    module: str
    use: Use | Literal["world", "bridge"]

    @property
    def nbytes(self) -> int:
        """Device memory that it takes on each of its ranks, in bytes, outside of torch's allocator.

        A constant for two ranks and one for more, as reported for four A100 on NVLink
        (https://github.com/NVIDIA/nccl/issues/964). It varies with NCCL's version, the number of its channels and the
        network; ``python -m tests.gpu`` measures it.
        """
        return _BYTES_OF_PAIR if len(self.ranks) == 2 else _BYTES_OF_MORE


def communicators(
    layout: MimoLayout,
    rank: int,
    *,
    experts: Collection[str] | None = None,
    frozen: Collection[str] = (),
    tied: bool = False,
    needs_gradient: Callable[[str, int], bool] | None = None,
    training: bool = True,
) -> Sequence[Communicator]:
    """Return the communicators of a rank in training, with those of the checks before the first step, or in evaluation.

    Sorted, so if all ranks make theirs in this order, one at a time, no two ranks wait for each other.

    Example: with ``{"images": ModuleParallelism(), "language": ModuleParallelism(tp=2)}``, rank 1 has four: of all
    ranks, of tp (1, 2), and two of the pair (0, 1), one for each direction.

    Args:
        layout: a resolved layout.
        rank: global rank.
        experts: modules with experts; ``None`` stands for those with ep or expt_tp above 1.
        frozen: modules that have no trained parameter on this rank.
        tied: whether the word embeddings are tied, so that the first and the last stage agree on the weights when the
            model is built, and reduce their gradients.
        needs_gradient: ``(module, pipeline stage)`` -> whether the output of that stage needs a gradient; ``None`` if
            every one does.
        training: whether the run trains; otherwise it validates, tests or predicts, and ``frozen`` and
            ``needs_gradient`` mean nothing.
    """
    if experts is None:
        experts = [name for name, sizes in layout.modules.items() if sizes.ep > 1 or sizes.expt_tp > 1]
    found = {Communicator(ranks=tuple(range(layout.world_size)), module="", use="world")}
    for name in layout.modules_on(rank):
        sizes = layout.modules[name]
        found.update(_of_model(name, sizes, rank, has_experts=name in experts, tied=tied, training=training))
        if training and name not in frozen:
            found.update(_of_gradients(name, sizes, rank, has_experts=name in experts))
        # Gradients cross where the language module has more replicas; nothing does where both have as many.
        crosses = training or sizes.dp > layout.modules[LANGUAGE].dp
        if layout.colocated and name != LANGUAGE and crosses:
            shared = _bridge_ranks(sizes, layout.modules[LANGUAGE], rank)
            found.add(Communicator(ranks=shared, module=name, use="bridge"))
    if not layout.colocated:
        for use, peer in _transfers(layout, rank, needs_gradient if training else _never):
            found.add(Communicator(ranks=(min(rank, peer), max(rank, peer)), module="", use=use))
    return sorted(each for each in found if len(each.ranks) > 1)


def largest_buffers(
    layout: MimoLayout, ranks: Collection[int], *, frozen: Collection[str] = ()
) -> tuple[int, Sequence[Communicator]]:
    """Bytes and communicators of the rank, of those given, whose communicators take the most in training.

    Args:
        layout: a resolved layout.
        ranks: global ranks, at least one.
        frozen: modules that have no trained parameter.
    """
    made = [communicators(layout, rank, frozen=frozen) for rank in ranks]
    return max(((sum(each.nbytes for each in of_rank), of_rank) for of_rank in made), key=lambda item: item[0])


def _never(module: str, stage: int) -> bool:
    return False


def _of_model(
    name: str, sizes: ResolvedParallelism, rank: int, *, has_experts: bool, tied: bool, training: bool
) -> Iterator[Communicator]:
    axes: list[tuple[str, ...]] = [("tp",)]
    if training:
        axes.append(("tp", "dp"))  # compares replicas before the first step
    yield from (Communicator(ranks=_ranks_along(sizes, rank, each), module=name, use="model") for each in axes)
    if has_experts:
        ranks = _ranks_along(sizes, rank, ("expt_tp", "ep"), of_experts=True)
        yield Communicator(ranks=ranks, module=name, use="model")
    stages = _ranks_along(sizes, rank, ("pp",))
    if tied and name == LANGUAGE and sizes.pp > 1 and rank in (stages[0], stages[-1]):
        yield Communicator(ranks=(stages[0], stages[-1]), module=name, use="model")


def _of_gradients(name: str, sizes: ResolvedParallelism, rank: int, *, has_experts: bool) -> Iterator[Communicator]:
    yield Communicator(ranks=_ranks_along(sizes, rank, ("dp",)), module=name, use="gradients")
    if has_experts:
        ranks = _ranks_along(sizes, rank, ("expt_dp",), of_experts=True)
        yield Communicator(ranks=ranks, module=name, use="expert gradients" if sizes.ep > 1 else "gradients")


def _ranks_along(
    sizes: ResolvedParallelism, rank: int, axes: Collection[str], *, of_experts: bool = False
) -> tuple[int, ...]:
    """Ranks of the group that contains a rank and spans these axes, ascending."""
    names, lengths = (EXPERT_AXES, sizes.expert_shape) if of_experts else (DENSE_AXES, sizes.shape)
    ranks, rest, stride = [sizes.ranks.start], rank - sizes.ranks.start, 1
    for name, length in zip(names, lengths, strict=True):
        rest, place = divmod(rest, length)
        ranks = [start + stride * i for i in (range(length) if name in axes else (place,)) for start in ranks]
        stride *= length
    return tuple(sorted(ranks))


def _bridge_ranks(encoder: ResolvedParallelism, language: ResolvedParallelism, rank: int) -> tuple[int, ...]:
    """Ranks that exchange rows over a bridge on shared ranks; this rank alone where both sides have the same dp."""
    many, few = (encoder, language) if encoder.dp > language.dp else (language, encoder)
    scale = many.dp // few.dp
    place = many.coordinates(rank)
    first = place["dp"] // scale * scale
    return tuple(sorted(many.rank_at(tp=place["tp"], dp=first + i, pp=0) for i in range(scale)))


def _transfers(
    layout: MimoLayout, rank: int, needs_gradient: Callable[[str, int], bool] | None
) -> Iterator[tuple[Use, int]]:
    """Yield the use of a group of all ranks and a rank with which this rank exchanges tensors in it."""
    activations, gradients = SENT
    for name in layout.modules_on(rank):
        mine = layout.modules[name]
        for source, stage, theirs, other, is_sender in _links(layout, name, mine.coordinates(rank)["pp"]):
            routes = routes_between(mine, theirs, rank=rank, stage=other)
            yield from ((activations, peer) for peer in (routes.receivers if is_sender else routes.receives))
            if needs_gradient is None or needs_gradient(source, stage):
                yield from ((gradients, peer) for peer in (routes.receives if is_sender else routes.receivers))


def _links(layout: MimoLayout, name: str, stage: int) -> Iterator[tuple[str, int, ResolvedParallelism, int, bool]]:
    """Yield the module and stage that send activations, the other side and its stage, and whether this side sends."""
    mine, language = layout.modules[name], layout.modules[LANGUAGE]
    if stage > 0:
        yield name, stage - 1, mine, stage - 1, False
    elif name == LANGUAGE:
        for encoder in layout.encoders:
            last = layout.modules[encoder].pp - 1
            yield encoder, last, layout.modules[encoder], last, False
    if stage < mine.pp - 1:
        yield name, stage, mine, stage + 1, True
    elif name != LANGUAGE:
        yield name, stage, language, 0, True

"""Communicators that a model needs on this rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from lightning_mimo.layout.communicators import Communicator, communicators
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.mimo.freezing import GradientFlow
from lightning_mimo.mimo.model import RaggedMimoModel, module_and_name
from lightning_mimo.parallel.infra import MimoModelInfra


def communicators_of(model: RaggedMimoModel, infra: MimoModelInfra, *, training: bool) -> Sequence[Communicator]:
    """Return what :func:`lightning_mimo.layout.communicators.communicators` returns for this model and rank.

    Collective over the world.

    Args:
        model: the model, wrapped or not, its parameters frozen as they are in training.
        infra: layout and process groups of this rank.
        training: whether the run trains.
    """
    layout, rank = infra.layout, dist.get_rank()
    flow = GradientFlow.build(model, infra)
    modules = {name: module_and_name(model, name)[0] for name in infra.participating_modules}
    return communicators(
        layout,
        rank,
        experts=[
            name
            for name, module in modules.items()
            if not all(getattr(parameter, "allreduce", True) for parameter in module.parameters())
        ],
        frozen=[name for name in modules if not flow.trained[name][layout.modules[name].coordinates(rank)["pp"]]],
        tied=LANGUAGE in modules and _is_tied(modules[LANGUAGE]),
        needs_gradient=flow.leaves,
        training=training,
    )


def _is_tied(language: object) -> bool:
    inner = getattr(language, "module", language)  # of DDP
    return bool(getattr(inner, "share_embeddings_and_output_weights", False))

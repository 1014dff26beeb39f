"""Rejects models whose result would depend on the layout, when their modules have been built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.models.mimo import MimoModel
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo.errors import DataError
from lightning_mimo.mimo.initialization import global_named_parameters
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.upstream.torch import _BatchNorm


def check_one_encoder(name: str, encoders: Sequence[torch.nn.Module]) -> None:
    """Refuse encoders whose embeddings would go to each other's samples.

    Args:
        name: of the module.
        encoders: of the module.

    Raises:
        DataError: if there are several.
    """
    if len(encoders) > 1:
        raise DataError(
            f"Module {name!r} has {len(encoders)} encoders ({', '.join(type(each).__name__ for each in encoders)}): "
            f"MimoModel puts the embeddings of all samples by the first one before those by the second, so samples "
            f"would get each other's. Give each encoder a module and a placeholder of its own, or write one encoder "
            f"that calls both and puts their tokens side by side: [items, tokens, hidden]."
        )


def check_embedding(model: MimoModel) -> None:
    """Check that the language module does not divide the sequence before text and images are combined."""
    embedding = getattr(model.language_model, "embedding", None)
    if model.config.sequence_parallel and getattr(embedding, "scatter_to_sequence_parallel", False):
        raise DataError(
            "sequence_parallel=True divides the sequence over the tensor-parallel ranks. MimoModel does this after "
            "combining text and encoder embeddings, but the language module's embedding would divide the text before. "
            "Pass scatter_embedding_sequence_parallel=False to GPTModel, as lightning_mimo.models.gpt does."
        )


def check_dropout(model: MimoModel, infra: MimoModelInfra) -> None:
    """Check that there is no dropout if colocated modules have different tp.

    A rank would have to draw the same numbers as its tensor-parallel peers, which differ from module to module.
    """
    sizes = infra.layout.modules
    if not infra.colocated or len({module.tp for module in sizes.values()}) == 1:
        return
    for part in model.modules():
        config = getattr(part, "config", None)
        if isinstance(config, TransformerConfig) and (config.hidden_dropout > 0 or config.attention_dropout > 0):
            raise DataError(
                f"Dropout (hidden {config.hidden_dropout}, attention {config.attention_dropout}) is not supported "
                f"where modules share their ranks with different tp "
                f"({', '.join(f'{name} tp={module.tp}' for name, module in sizes.items())}): tensor-parallel peers of "
                f"one module would draw different masks. Set both to 0, give all modules the same tp, or put them on "
                f"separate ranks."
            )


def check_batch_norm(model: MimoModel) -> None:
    """Check that there is no batch norm, which makes a sample's result depend on the other samples of its rank."""
    for path, part in model.named_modules():
        if isinstance(part, _BatchNorm):
            raise DataError(
                f"{path!r} is a {type(part).__name__}: it takes statistics over the items of one rank and microbatch, "
                f"so results would depend on the layout. Use LayerNorm or GroupNorm, or "
                f"torchvision.ops.FrozenBatchNorm2d, whose statistics are constant."
            )


def check_stages(modules: Mapping[str, torch.nn.Module], infra: MimoModelInfra) -> None:
    """Check that pipeline stages hold different parameters. Collective over the world.

    Args:
        modules: name -> module, of those on this rank.
        infra: process groups of this rank.
    """
    divided = {name: sizes for name, sizes in infra.layout.modules.items() if sizes.pp > 1}
    if not divided:
        return
    mine: dict[str, set[str]] = {}
    for name in modules.keys() & divided.keys():
        groups = infra.pg_collections[name]
        if groups.tp.rank() == groups.dp.rank() == 0:
            parameters = global_named_parameters(modules[name], prefix=name, groups=groups)
            mine[name] = {path for path, parameter in parameters if not getattr(parameter, "shared_embedding", False)}
    # Of all ranks, not of those of a pipeline: on GPUs that would make a communicator for this alone.
    held: list[dict[str, set[str]]] = [{}] * infra.layout.world_size
    dist.all_gather_object(held, mine)
    for name, sizes in divided.items():
        _check_divided(name, [held[sizes.rank_at(tp=0, dp=0, pp=stage)][name] for stage in range(sizes.pp)])


def _check_divided(name: str, stages: Sequence[set[str]]) -> None:
    """Check that no stage of a module holds a parameter of an earlier one."""
    for stage, held in enumerate(stages[1:], start=1):
        if both := sorted(held & set().union(*stages[:stage])):
            raise DataError(
                f"Module {name!r}: pp={len(stages)}, but stage {stage} holds {both[0]!r}"
                f"{f' and {len(both) - 1} more' if len(both) > 1 else ''}, which an earlier stage holds too: it is not "
                f"divided into pipeline stages. Set pp=1, or let each stage build its own layers only, as "
                f"lightning_mimo.models.vision does."
            )

"""The order in which a pipeline stage runs the forward and backward passes of a global batch. Pure Python, no torch.

Modules on ranks of their own run Megatron's 1F1B schedule: a stage first runs as many forward passes as there are
stages behind it, then one forward and one backward pass in turn, then the remaining backward passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from lightning_mimo.layout.module_parallelism import LANGUAGE, ModuleParallelism

Direction = Literal["forward", "backward"]
Pass = tuple[Direction, int]
"""Direction and index of the microbatch."""


def stages_behind(
    modules: Mapping[str, ModuleParallelism], name: str, stage: int, *, encoder_run_ahead: int = 0
) -> int:
    """Number of later pipeline stages, which is the number of forward passes that a stage runs first.

    It is counted from the end of the pipeline, which all modules share: an encoder with fewer stages than another does
    not run ahead of it.

    Example: with language pp=2, the only stage of an encoder has 2 stages behind it, and with a run-ahead of 1 it
    computes 3 microbatches before its first backward pass.

    Args:
        modules: module name -> sizes, of modules on ranks of their own.
        name: the module.
        stage: its pipeline stage.
        encoder_run_ahead: microbatches that encoders compute before 1F1B requests them.
    """
    behind = modules[name].pp - 1 - stage
    if name != LANGUAGE:
        behind += modules[LANGUAGE].pp + encoder_run_ahead
    return behind


def order_of_passes(behind: int, num_microbatches: int) -> list[Pass]:
    """The passes of one stage of a global batch, in Megatron's 1F1B order.

    Example:
        >>> order_of_passes(1, 3)[:3]
        [('forward', 0), ('forward', 1), ('backward', 0)]

    Args:
        behind: number of stages behind this one; see :func:`stages_behind`.
        num_microbatches: of the global batch.
    """
    warmup = min(behind, num_microbatches)
    order: list[Pass] = [("forward", i) for i in range(warmup)]
    for i in range(num_microbatches - warmup):
        order += [("forward", warmup + i), ("backward", i)]
    return order + [("backward", i) for i in range(num_microbatches - warmup, num_microbatches)]

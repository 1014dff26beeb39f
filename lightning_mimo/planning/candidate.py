"""A way to run a training step, and where the costs of its modules come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE, ResolvedParallelism
from lightning_mimo.planning.costs import ModuleCosts


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Settings of the model that change what its layers cost.

    Attributes:
        recompute: modules all of whose layers are recomputed in the backward pass.
        sequence_parallel: whether the sequence of the language module is divided over its tensor-parallel ranks.
    """

    recompute: frozenset[str]
    sequence_parallel: bool


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout and the settings of a run in it.

    Attributes:
        layout: which module runs on which ranks.
        num_microbatches: of a global batch.
        encoder_run_ahead: as for MimoStrategy.
        distributed_optimizer: whether the optimizer's state is divided over the replicas.
        overlap: whether gradients are reduced during the last backward pass.
        variant: settings of the model.
    """

    layout: MimoLayout
    num_microbatches: int
    encoder_run_ahead: int
    distributed_optimizer: bool
    overlap: bool
    variant: Variant

    def __str__(self) -> str:
        modules = "; ".join(f"{name} {sizes_of(each)}" for name, each in self.layout.modules.items())
        text = f"{'colocated' if self.layout.colocated else 'apart'}: {modules}; {self.num_microbatches} microbatches"
        if not self.layout.colocated and len(self.layout.modules) > 1:
            text += f", run-ahead {self.encoder_run_ahead}"
        recomputed = [name for name in self.layout.modules if name in self.variant.recompute]
        which = "recompute" if len(recomputed) == len(self.layout.modules) else f"recompute {' and '.join(recomputed)}"
        switches = {
            which: bool(recomputed),
            "sequence parallel": self.variant.sequence_parallel and self.layout.modules[LANGUAGE].tp > 1,
            "distributed optimizer": self.distributed_optimizer,
        }
        return ", ".join([text, *(name for name, is_on in switches.items() if is_on)])


def sizes_of(sizes: ResolvedParallelism) -> str:
    """Sizes of a module as text, without those that are 1 except dp."""
    axes = {"tp": sizes.tp, "pp": sizes.pp, "ep": sizes.ep, "expt_tp": sizes.expt_tp}
    return " ".join([*(f"{axis}={size}" for axis, size in axes.items() if size > 1), f"dp={sizes.dp}"])


CostsOf = Callable[[str, ResolvedParallelism, Variant, int], ModuleCosts]
"""``(module, its sizes, variant, samples of a microbatch on one replica)`` -> costs of the module on one rank."""


StageLayers = Callable[[str, int], Sequence[int] | None]
"""``(module, pp)`` -> layers of each pipeline stage; ``None`` divides them evenly."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is known about a model and its batches.

    Attributes:
        costs: costs of each module; called often, so it remembers what it has measured.
        global_batch_size: samples of a global batch.
        tokens: tokens of the language module per sample, padding included.
        dtype: of the matrix products, a key of ``Hardware.flops``.
        trains: module name -> whether anything in it is trained, so that gradients are sent to it.
        stage_layers: layers of the pipeline stages of modules; ``None`` divides them evenly.
    """

    costs: CostsOf
    global_batch_size: int
    tokens: float
    dtype: str
    trains: Mapping[str, bool]
    stage_layers: StageLayers | None = None

"""Layouts and options that are run rank by rank on fake GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_mimo.layout.module_parallelism import ModuleParallelism

Stage = Literal["validate", "save", "resume", "predict"]

_OVERLAPPING = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training run.

    Attributes:
        modules: parallel sizes of the modules.
        colocate: all modules on all ranks.
        experts: whether the language module is a mixture of experts.
        frozen: as for MimoModule.
        precision: of the Trainer.
        ddp: fields of DistributedDataParallelConfig.
        num_microbatches: microbatches of a global batch.
        accumulate: global batches of an optimizer step.
        sequence_parallel: of the language module.
        stages: what is done besides training.
        steps: optimizer steps; rules about steps need two, and three with validation, which leaves metrics behind once.
        faults: names of functions in ``faults.py``, which break rules; of those that change the loss, the last first.
    """

    modules: Mapping[str, ModuleParallelism]
    colocate: bool = False
    experts: bool = False
    frozen: tuple[str, ...] = ()
    precision: str = "bf16-mixed"
    ddp: Mapping[str, Any] = field(default_factory=dict)
    num_microbatches: int = 2
    accumulate: int = 1
    sequence_parallel: bool = False
    stages: tuple[Stage, ...] = ()
    steps: int = 2
    faults: tuple[str, ...] = ()

    @property
    def global_batch_size(self) -> int:
        """One sample in every microbatch for dp=2, and two for dp=1."""
        return 2 * self.num_microbatches

    @property
    def world_size(self) -> int:
        sizes = [sizes.size for sizes in self.modules.values()]
        return max(sizes) if self.colocate else sum(sizes)


def _apart(images: Mapping[str, int], language: Mapping[str, int]) -> dict[str, ModuleParallelism]:
    return {
        name: ModuleParallelism(**{"dp": 1, **sizes}) for name, sizes in (("images", images), ("language", language))
    }


CASES: dict[str, Case] = {
    "apart": Case(modules=_apart({}, {}), stages=("validate",), steps=3),
    "colocated, fan-in, float16": Case(
        modules=_apart({"dp": 2}, {"tp": 2}),
        colocate=True,
        sequence_parallel=True,
        precision="16-mixed",
        num_microbatches=1,
    ),
    "pp of both sides": Case(modules=_apart({"pp": 2}, {"pp": 2})),
    "two encoders": Case(
        modules={name: ModuleParallelism(dp=1) for name in ("images", "audio", "language")}, stages=("predict",)
    ),
    "experts": Case(modules=_apart({"dp": 2}, {"dp": 2, "ep": 2}), colocate=True, experts=True, num_microbatches=1),
    "frozen": Case(modules=_apart({}, {}), frozen=("images.encoders", "language")),
    "distributed optimizer, both overlaps, checkpoints": Case(
        modules=_apart({"dp": 2}, {"dp": 2}),
        colocate=True,
        ddp=_OVERLAPPING,
        num_microbatches=1,
        stages=("save", "resume"),
    ),
    "one rank, bfloat16 without main parameters": Case(
        modules=_apart({}, {}), colocate=True, precision="bf16-true", num_microbatches=1
    ),
}
"""Cases of the default run, by name."""


def _with_faults(*faults: str, ranks: int, steps: int = 2) -> Case:
    return Case(
        modules=_apart({"dp": ranks}, {"dp": ranks}), colocate=True, num_microbatches=1, faults=faults, steps=steps
    )


FAULTS: dict[str, Case] = {
    "careless": _with_faults("reads_in_forward", "copies_and_waits", "multiplies_in_float32", "keeps_outputs", ranks=1),
    "other order": _with_faults(
        "sends_in_another_order", "ends_after_forward", "uses_first_gpu", "uses_new_communicator", ranks=2, steps=1
    ),
    "circle": _with_faults("sends_before_receiving", ranks=2, steps=1),
}
"""Runs in which functions of ``faults.py`` break rules, by name."""

FAILING: dict[str, Case] = {
    "tensor on the CPU": _with_faults("has_tensor_on_cpu", ranks=1),
    "barrier": _with_faults("has_barrier_without_device", ranks=1, steps=1),
}
"""The same, of those that end with an error."""

EXHAUSTIVE: dict[str, Case] = {
    "distributed optimizer, accumulation": Case(
        modules=_apart({"dp": 2}, {"dp": 2}), colocate=True, ddp=_OVERLAPPING, accumulate=2
    ),
    "apart, tp, float16": Case(modules=_apart({}, {"tp": 2}), precision="16-mixed"),
    "apart, checkpoints": Case(modules=_apart({}, {"dp": 2}), ddp=_OVERLAPPING, stages=("save", "resume")),
    "apart, every axis": Case(
        modules=_apart({"tp": 2}, {"tp": 2, "pp": 2, "dp": 2}), num_microbatches=3, sequence_parallel=True
    ),
    "two encoders, pipelines, distributed optimizer": Case(
        modules={
            "images": ModuleParallelism(pp=2, dp=1),
            "audio": ModuleParallelism(dp=2),
            "language": ModuleParallelism(pp=2, dp=2),
        },
        ddp=_OVERLAPPING,
        stages=("validate", "save", "resume", "predict"),
        steps=3,
    ),
    "colocated, fan-out, float16": Case(
        modules=_apart({"tp": 2}, {"dp": 2}),
        colocate=True,
        precision="16-mixed",
        stages=("validate", "predict"),
        steps=3,
    ),
    "experts apart, pp": Case(
        modules=_apart({"dp": 2}, {"dp": 2, "ep": 2, "pp": 2}), experts=True, ddp=_OVERLAPPING, accumulate=2
    ),
    "frozen, tp, float32": Case(modules=_apart({}, {"tp": 2}), precision="32-true", frozen=("images",)),
    "frozen language, pp": Case(modules=_apart({}, {"pp": 2}), frozen=("images.encoders", "language")),
}
"""Further cases of ``pytest -m exhaustive``, by name."""

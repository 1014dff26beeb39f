"""What a child process is to train: plain data that travels as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

APART = {"images": {}, "language": {}}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run on synthetic images and text, and what is measured in it.

    Attributes:
        loop: ``trainer`` is MimoStrategy; ``bare`` is megatron-core's own schedule and optimizer around the same model;
            ``transformers`` is a Llama of the language module's size under Lightning's DDPStrategy; ``evaluation`` is
            MimoStrategy without training; ``attention`` runs the tests of attention on a GPU, and ``predict`` estimates
            memory and time of a step: they train nothing.
        modules: name -> arguments of ModuleParallelism.
        attention: of both transformers, if the package lets one choose.
        distributed: the distributed optimizer with both overlaps.
        steps: optimizer steps; the first and last few are not timed.
        batch: samples of a step.
        length: tokens of a sample, those of its image included; of the longest with ``pack_to``.
        pack_to: tokens of a row into which samples of different lengths are packed, balanced over replicas.
        timeout: seconds that a rank may wait for another.
        hangs: rank that stops in its third step.
        evaluate: validate and predict after training.
        profile: which kernels of one step took longest.
        checkpoint: directory to save to, behind the training and before it goes on, and to load from.
    """

    loop: str = "trainer"
    accelerator: str = "gpu"
    precision: str = "32-true"
    modules: dict[str, dict[str, int]] = field(default_factory=lambda: dict(APART))
    colocate: bool = True
    ranks: int = 1
    attention: str | None = None
    distributed: bool = False
    recompute: bool = False
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    vocabulary: int = 512
    length: int = 192
    pack_to: int | None = None
    batch: int = 8
    microbatches: int = 2
    steps: int = 12
    timeout: float = 60.0
    hangs: int | None = None
    evaluate: bool = False
    profile: bool = False
    checkpoint: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Run:
        return cls(**json.loads(text))

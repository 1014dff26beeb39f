"""Finds where a loss or a gradient became NaN or infinite: afterwards, so that watching for it costs nothing.

The optimizer's one read to the host tells that a step was not finite, and no rank has updated then. The batch is run
once more, one microbatch at a time, and everything is looked at in the order in which it is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.mimo.model import RaggedMimoModel, module_and_name
from lightning_mimo.mimo.parameter_names import named_parameters_of
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.schedule.forward_backward import ForwardStep, GlobalBatchSchedule, LossFunction

_SHOWN = 16


class Phase(IntEnum):
    """What is computed of a microbatch, in that order."""

    WEIGHTS = 0
    INPUTS = 1
    ENCODER_OUTPUTS = 2
    LANGUAGE_OUTPUT = 3
    LOSS = 4
    LANGUAGE_GRADIENTS = 5
    ENCODER_GRADIENTS = 6

    @property
    def is_backward(self) -> bool:
        """Whether it goes from the last pipeline stage to the first."""
        return self >= Phase.LANGUAGE_GRADIENTS


@dataclass(frozen=True, kw_only=True, order=True)
class Finding:
    """A weight, input, output, loss or gradient with NaN or infinity in it. Ordered as they are computed.

    Attributes:
        microbatch: which one; -1 for what was there before.
        phase: of its computation.
        stage: pipeline stage; negative in backward phases, so that the last one comes first.
        module: name of the module.
        rank: global rank.
        what: what is not finite, in words.
        samples: dataset indices of the samples that went into it.
    """

    microbatch: int
    phase: Phase
    stage: int
    module: str
    rank: int
    what: str
    samples: tuple[int, ...]


class _Watch:
    """Notes what is NaN or infinite on this rank."""

    def __init__(self, model: RaggedMimoModel, infra: MimoModelInfra) -> None:
        self.found: list[Finding] = []
        self._model = model
        self._infra = infra
        self._microbatch = -1
        self._batch: Microbatch = {}

    def weights(self) -> None:
        for module in self._infra.participating_modules:
            self._first_parameter(module, "weight", phase=Phase.WEIGHTS)

    def begin(self, index: int, batch: Microbatch) -> None:
        """From now on it is this microbatch."""
        self._microbatch, self._batch = index, batch
        for module, inputs in batch["modality_inputs"].items():
            if self._stage(module) == 0:
                self._inputs(module, inputs or {})

    def gradients(self) -> None:
        for module in self._infra.participating_modules:
            phase = Phase.LANGUAGE_GRADIENTS if module == LANGUAGE else Phase.ENCODER_GRADIENTS
            self._first_parameter(module, "main_grad", phase=phase)

    def loss(self, value: torch.Tensor) -> None:
        if not value.isfinite().all():
            self._note(LANGUAGE, "the loss", phase=Phase.LOSS)

    @contextlib.contextmanager
    def outputs(self) -> Iterator[None]:
        """Look at what modules return while this is open."""
        with contextlib.ExitStack() as stack:
            for name in self._infra.participating_modules:
                # megatron-core calls forward() of what is outermost itself, past its hooks.
                module = unwrap_model(module_and_name(self._model, name)[0])
                stack.callback(module.register_forward_hook(self._output_hook(name)).remove)
            yield

    def _output_hook(self, name: str) -> Any:
        phase = Phase.LANGUAGE_OUTPUT if name == LANGUAGE else Phase.ENCODER_OUTPUTS

        def look(module: torch.nn.Module, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor) and not output.isfinite().all():
                self._note(name, "the output", phase=phase)

        return look

    def _inputs(self, module: str, inputs: dict[str, dict[str, torch.Tensor]]) -> None:
        counts = self._batch["modality_counts"][module]
        own = counts.sample_indices[counts.own.start : counts.own.stop]
        of_item = [index for index, items in zip(own, counts.items, strict=True) for _ in range(items)]
        for encoder, arguments in inputs.items():
            for name, value in arguments.items():
                if value.is_floating_point() and of_item and not value.isfinite().all():
                    bad = (~value.isfinite()).flatten(1).any(dim=1).tolist()
                    samples = {index for index, is_bad in zip(of_item, bad, strict=True) if is_bad}
                    what = f"the input {encoder}.{name}"
                    self._note(module, what, phase=Phase.INPUTS, samples=tuple(sorted(samples)))

    def _first_parameter(self, module: str, what: str, *, phase: Phase) -> None:
        for name, parameter in named_parameters_of(self._model, self._infra, module):
            values = parameter if what == "weight" else getattr(parameter, what, None)
            if values is not None and not values.isfinite().all():
                described = f"the weight {name}" if what == "weight" else f"the gradient of {name}"
                self._note(module, described, phase=phase)
                return

    def _note(self, module: str, what: str, *, phase: Phase, samples: tuple[int, ...] | None = None) -> None:
        stage = self._stage(module) * (-1 if phase.is_backward else 1)
        self.found.append(
            Finding(
                microbatch=self._microbatch,
                phase=phase,
                stage=stage,
                module=module,
                rank=dist.get_rank(),
                what=what,
                samples=self._samples_of(module) if samples is None else samples,
            )
        )

    def _stage(self, module: str) -> int:
        return self._infra.layout.modules[module].coordinates(dist.get_rank())["pp"]

    def _samples_of(self, module: str) -> tuple[int, ...]:
        if self._microbatch < 0:
            return ()
        if module == LANGUAGE:
            return tuple(self._batch["sample_indices"])
        counts = self._batch["modality_counts"][module]
        return counts.sample_indices[counts.own.start : counts.own.stop]


def find_nonfinite(
    schedule: GlobalBatchSchedule,
    model: RaggedMimoModel,
    infra: MimoModelInfra,
    microbatches: Sequence[Microbatch],
    forward: ForwardStep,
    loss: LossFunction,
) -> list[Finding]:
    """Run a batch again, forward and backward without an update, and look for what is not finite.

    Collective over the world. Gradient buffers are overwritten.

    Returns:
        The first thing that is not finite, more than once where several ranks have it; the same on every rank. Empty if
        all is finite this time.
    """
    watch = _Watch(model, infra)
    watch.weights()

    def watched_loss(output: Any, microbatch: Microbatch) -> Any:
        total, tokens, metrics = loss(output, microbatch)
        watch.loss(total)
        return total, tokens, metrics

    with watch.outputs():
        for index, microbatch in enumerate(microbatches):
            watch.begin(index, microbatch)
            schedule.zero_grad()
            schedule.train([microbatch], forward, watched_loss, optimizer=None)
            watch.gradients()
    everywhere: list[list[Finding]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, watch.found)
    found = sorted(finding for each in everywhere for finding in each)
    return [each for each in found if (each.microbatch, each.phase, each.stage) == _place(found[0])]


def describe(found: Sequence[Finding]) -> str:
    """A sentence for what :func:`find_nonfinite` returned."""
    if not found:
        return (
            "When the batch was run again, everything was finite. Dropout may have been the difference, or an earlier "
            "batch of the accumulation window, or a device that computes wrongly."
        )
    first = found[0]
    ranks = sorted({finding.rank for finding in found})
    where = (
        f"{first.what} of module {first.module!r} on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    )
    if first.microbatch < 0:
        return f"{where} is not finite already before the batch."
    samples = sorted({index for finding in found for index in finding.samples})
    shown = ", ".join(map(str, samples[:_SHOWN]))
    more = f" and {len(samples) - _SHOWN} more" if len(samples) > _SHOWN else ""
    return f"The first that is not finite: {where}, in microbatch {first.microbatch}, samples {shown}{more}."


def _place(finding: Finding) -> tuple[int, Phase, int]:
    return finding.microbatch, finding.phase, finding.stage

"""Estimates a whole training step on every kind of rank, in one process and without a GPU.

Each kind of rank runs a step on fake tensors, which have a shape but no memory: with the user's model, our schedule,
Megatron's DDP and the optimizer. Nothing is modelled a second time. Layers are alike, so two models with few layers
are run in place of one with many, and the rest follows.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_mimo.data.sample_format import Sample
from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.communicators import largest_buffers
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.planning.costs import ModuleWork, RankEstimate, StepMemory, Work
from lightning_mimo.planning.depths import Depth, depths_of, with_layers
from lightning_mimo.planning.fake_world import as_rank
from lightning_mimo.planning.rank_step import (
    RankRecording,
    StepSettings,
    TrainingProgram,
    collect_flags,
    run_rank,
)
from lightning_mimo.planning.step_recorder import STEP, Exchange

_AS_GOOD_AS = 0.9999  # of the peak
_PURPOSES = ("weights", "gradients", "optimizer", "batch", "activations")


@dataclass(frozen=True, kw_only=True)
class RankKind:
    """Ranks that hold the same pipeline stages of the same modules.

    Attributes:
        stages: module -> pipeline stage, counted from 0.
        ranks: the ranks.
    """

    stages: Mapping[str, int]
    ranks: range


def rank_kinds(layout: MimoLayout) -> list[RankKind]:
    """Kinds of ranks in the order of the modules and their stages. Ranks of a stage are consecutive."""
    if layout.colocated:
        return [RankKind(stages=dict.fromkeys(layout.modules, 0), ranks=range(layout.world_size))]
    kinds = []
    for name, sizes in layout.modules.items():
        size = sizes.size // sizes.pp
        for stage in range(sizes.pp):
            begin = sizes.ranks.start + stage * size
            kinds.append(RankKind(stages={name: stage}, ranks=range(begin, begin + size)))
    return kinds


def step_estimate(
    settings: StepSettings, program: TrainingProgram, sample: Sample, *, all_layers: bool = False
) -> tuple[RankEstimate, ...]:
    """Run a step of the first rank of each kind on fake tensors.

    torch.distributed must not be initialized in this process. Ranks are taken to be busy alike: every microbatch is
    made of the same sample, experts get equally many tokens, and of ranks of a kind the first stands for all.

    Args:
        settings: of the run.
        program: the user's code. It must not read the values of weights or activations.
        sample: of which every microbatch is made, such as the largest one of a dataset.
        all_layers: whether to run all layers in place of a few.

    Returns:
        One estimate for each kind of rank, in the order of :func:`rank_kinds`.

    Raises:
        LayoutError: if the model does not fit the layout.
        ConfigError: if a name in ``frozen`` or of an override matches no parameter, or the optimizer is not valid.
        DataError: if the sample does not fit the model.
    """
    kinds = rank_kinds(settings.layout)
    try:
        runs = _Runs(settings=settings, program=program, sample=sample, kinds=kinds, all_layers=all_layers)
        return tuple(runs.estimate(number) for number in range(len(kinds)))
    except ConfigError:
        if all_layers:
            raise
        # It may have been about a layer that there is only in the whole model.
        return step_estimate(settings, program, sample, all_layers=True)


def check_set_up(settings: StepSettings, program: TrainingProgram) -> None:
    """Set up the first rank of each kind, with its optimizer, and run nothing; errors as of :func:`step_estimate`."""
    said = Exchange()
    for kind in rank_kinds(settings.layout):
        collect_flags(settings, _with_few(settings, program, _depths(settings, program, kind)), kind.ranks[0], said)


def _depths(
    settings: StepSettings, program: TrainingProgram, kind: RankKind, trained: Container[str] = ()
) -> dict[str, Depth]:
    if any(".layers." in name for name in program.frozen):
        return {}
    with as_rank(settings.layout, kind.ranks[0]) as infra:
        return depths_of(program.configure(infra), kind.stages, trained=trained)


def _with_few(
    settings: StepSettings, program: TrainingProgram, depths: Mapping[str, Depth], more: str = ""
) -> TrainingProgram:
    """The program with few layers of every module, but with some more of one."""
    layers = {name: depth.more if name == more else depth.few for name, depth in depths.items()}
    return replace(program, configure=with_layers(program.configure, settings.layout, layers))


class _Runs:
    """Runs of all kinds of ranks, with few layers and with some more of one module each."""

    def __init__(
        self,
        *,
        settings: StepSettings,
        program: TrainingProgram,
        sample: Sample,
        kinds: Sequence[RankKind],
        all_layers: bool,
    ) -> None:
        self._settings, self._program, self._sample = settings, program, sample
        self._kinds = kinds
        self._depths: list[Mapping[str, Depth]] = []
        first = Exchange()
        for kind in kinds:
            depths = {} if all_layers else _depths(settings, program, kind)
            trained = collect_flags(settings, _with_few(settings, program, depths), kind.ranks[0], first)
            self._depths.append(depths and _depths(settings, program, kind, trained))
        self._flags, self._operations = first.flags, first.operations
        self._exchanges: dict[str, Exchange] = {}

    def estimate(self, number: int) -> RankEstimate:
        kind, depths = self._kinds[number], self._depths[number]
        base = self._run(kind, depths)
        more = {name: self._run(kind, depths, more=name) for name in depths}
        factors = {name: depth.factor for name, depth in depths.items()}
        phase, peak = _peak(base, more, factors)
        memory = {purpose: max(0, round(size)) for purpose, size in peak.items()}
        if self._settings.device_type == "cuda":
            memory["communicators"], _ = largest_buffers(self._settings.layout, kind.ranks, frozen=base.frozen)
        memory["batch"] = memory["batch"] * self._settings.num_microbatches // base.microbatches
        work = {
            name: ModuleWork(
                **{
                    each: _total(base, more, factors, name, each).scaled(1 / base.microbatches)
                    for each in ("forward", "backward", "recompute")
                }
            )
            for name in kind.stages
        }
        return RankEstimate(
            stages=kind.stages,
            ranks=kind.ranks,
            memory=StepMemory(**memory),
            peak_at=str(phase),
            work=work,
            step=_total(base, more, factors, "", STEP),
            num_microbatches=self._settings.num_microbatches,
        )

    def _run(self, kind: RankKind, depths: Mapping[str, Depth], more: str = "") -> RankRecording:
        # Later stages of an encoder are told what earlier ones have sent with the same layers.
        exchange = self._exchanges.setdefault(more, Exchange(flags=self._flags, operations=self._operations))
        program = _with_few(self._settings, self._program, depths, more)
        return run_rank(self._settings, program, kind.ranks[0], exchange, sample=self._sample)


def _peak(
    base: RankRecording, more: Mapping[str, RankRecording], factors: Mapping[str, float]
) -> tuple[Hashable, dict[str, float]]:
    """The phase of the peak, and bytes by purpose in it, with all layers."""

    def bytes_of(run: RankRecording, phase: Hashable, purpose: str) -> int:
        return run.peaks[phase].get(purpose, 0)

    def at(phase: Hashable) -> dict[str, float]:
        found = {}
        for purpose in _PURPOSES:
            few = bytes_of(base, phase, purpose)
            added = (factors[name] * (bytes_of(run, phase, purpose) - few) for name, run in more.items())
            found[purpose] = few + sum(added)
        return found

    common = [phase for phase in base.peaks if all(phase in run.peaks for run in more.values())]
    peaks = {phase: at(phase) for phase in common}
    sums = {phase: sum(sizes.values()) for phase, sizes in peaks.items()}
    # The first one of equal ones; with every microbatch, a rank holds some bytes more, for its loss.
    phase = next(phase for phase, total in sums.items() if total >= _AS_GOOD_AS * max(sums.values()))
    return phase, max(peaks.values(), key=lambda sizes: sum(sizes.values()))


def _total(
    base: RankRecording, more: Mapping[str, RankRecording], factors: Mapping[str, float], module: str, pass_: str
) -> Work:
    total = few = base.recorder.work(module, pass_)
    for name, run in more.items():
        total += (run.recorder.work(module, pass_) + few.scaled(-1)).scaled(factors[name])
    return total

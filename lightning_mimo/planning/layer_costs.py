"""Costs of one layer of a module, and of what its first and last stage have besides, measured on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from typing import Literal

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo import MimoModelConfig

from lightning_mimo.data.sample_format import Sample
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE, ModuleParallelism
from lightning_mimo.mimo.dtypes import DtypePolicy
from lightning_mimo.mimo.model import RaggedMimoModel
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.planning.costs import ModuleCosts, ModuleWork, PartCosts, Work
from lightning_mimo.planning.depths import transformer_of, with_layers
from lightning_mimo.planning.fake_world import Configure, as_rank
from lightning_mimo.planning.gpu_kernels import DeviceType
from lightning_mimo.planning.memory_estimate import ParameterSize, frozen_sizes, parameter_sizes
from lightning_mimo.planning.operation_cache import OperationCache
from lightning_mimo.planning.rank_step import (
    RankRecording,
    StepSettings,
    TrainingProgram,
    collect_flags,
    run_microbatch,
)
from lightning_mimo.planning.step_recorder import Exchange, Phase, Segment

_FEW, _MORE = 2, 3
_SEGMENTS: Mapping[Part, Segment] = {"first": "before", "layer": "layers", "last": "after"}
type Part = Literal["first", "layer", "last"]


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """What decides the costs of a module's layers on one rank.

    Attributes:
        module: name of the module.
        tp: tensor-parallel size.
        ep: expert-parallel size.
        expt_tp: tensor-parallel size inside one expert.
        samples: samples of a microbatch on one replica.
        recompute: whether every layer is recomputed in the backward pass; ``None`` leaves it as the model says.
        sequence_parallel: whether the sequence is divided over tp between attention and MLP; ``None`` leaves it as the
            model says. Only for the language module, and without effect if tp=1.
    """

    module: str
    tp: int = 1
    ep: int = 1
    expt_tp: int = 1
    samples: int = 1
    recompute: bool | None = None
    sequence_parallel: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a module runs with some settings.

    Attributes:
        layout: resolved layout.
        rank: a rank of the module.
        configure: describes the model with these settings.
    """

    layout: MimoLayout
    rank: int
    configure: Configure


Watch = Callable[[RaggedMimoModel], None]
"""Is given a model before it runs."""


class LayerCosts:
    """Measures the costs of layers and remembers them.

    A measurement runs one microbatch of a model with two layers and of one with three; it takes about a second.
    """

    def __init__(
        self,
        program: TrainingProgram,
        sample: Sample,
        *,
        modules: Iterable[str],
        dtype_policy: DtypePolicy,
        device_type: DeviceType = "cpu",
    ) -> None:
        """
        Args:
            program: the user's code.
            sample: of which every microbatch is made.
            modules: names of all modules of the model.
            dtype_policy: dtypes of the run.
            device_type: of the run's devices, whose kernels are counted.
        """
        self._program, self._sample, self._device_type = program, sample, device_type
        self._modules, self._dtype_policy = tuple(modules), dtype_policy
        self._known: dict[LayerSettings, ModuleCosts] = {}
        self._flags: list[list[bool]] | None = None
        self._operations = OperationCache()

    def __call__(self, settings: LayerSettings) -> ModuleCosts:
        """Return the costs of a module. torch.distributed must not be initialized in this process.

        Costs of more than two samples follow from those of one and of two.

        Raises:
            LayoutError: if the model does not divide over tp, ep or expt_tp.
        """
        if settings not in self._known:
            if settings.samples > 2:
                one, two = (self(replace(settings, samples=samples)) for samples in (1, 2))
                self._known[settings] = _between(one, two, settings.samples - 1)
            else:
                self._known[settings] = self._measure(settings)
        return self._known[settings]

    def place(self, settings: LayerSettings) -> Place:
        """The smallest layout in which a module runs with some settings. Every other module has a rank of its own."""
        experts = settings.ep * settings.expt_tp
        dp = experts // gcd(experts, settings.tp)
        sizes = {name: ModuleParallelism(dp=1) for name in self._modules}
        own = ModuleParallelism(tp=settings.tp, ep=settings.ep, expt_tp=settings.expt_tp, dp=dp)
        sizes[settings.module] = own
        layout = MimoLayout.resolve(sizes, world_size=sum(each.size for each in sizes.values()))
        return Place(
            layout=layout,
            rank=layout.modules[settings.module].ranks[0],
            configure=partial(_as_settings, self._program.configure, settings),
        )

    def _measure(self, settings: LayerSettings) -> ModuleCosts:
        place = self.place(settings)
        layout, rank, configure = place.layout, place.rank, place.configure
        with as_rank(layout, rank) as infra:
            transformer = transformer_of(configure(infra), settings.module)
        layers = 0 if transformer is None else transformer.num_layers
        depths = (_FEW, _MORE) if layers > _MORE else (layers, layers)
        runs = [self.run(place, settings, depth) for depth in dict.fromkeys(depths)]
        parts = _parts(runs, depths, settings.module)
        held = self._parameters(layout, rank, configure, settings, depths[0])

        def with_state(part: Part) -> PartCosts:
            sizes = [size for path, size in held.items() if _part_of(path) == part]
            return _with_state(parts[part], sizes, self._dtype_policy, layers=depths[0] if part == "layer" else 1)

        return ModuleCosts(
            module=settings.module,
            num_layers=layers,
            layer=with_state("layer") if layers else PartCosts(),
            first=with_state("first"),
            last=with_state("last"),
            boundary_bytes=runs[0].recorder.layer_output,
            output_bytes=0 if settings.module == LANGUAGE else _output_bytes(runs[0], settings.module),
        )

    def run(self, place: Place, settings: LayerSettings, depth: int, *, watch: Watch | None = None) -> RankRecording:
        """Run one microbatch. torch.distributed must not be initialized in this process.

        Args:
            place: of the settings.
            settings: module, sizes and samples.
            depth: layers of the module; 0 for all.
            watch: is given the model before it runs.
        """
        layout, rank, configure = place.layout, place.rank, place.configure
        layers = {settings.module: depth} if depth else {}
        step = StepSettings(
            layout=layout,
            dtype_policy=self._dtype_policy,
            ddp={name: DistributedDataParallelConfig() for name in layout.modules},
            samples=settings.samples * layout.modules[settings.module].dp,
            num_microbatches=1,
            device_type=self._device_type,
        )
        program = replace(self._program, configure=with_layers(configure, layout, layers))
        if watch is not None:
            program = replace(program, attach=partial(_attach_and_watch, program.attach, watch))
        if self._flags is None:  # which modules are trained does not depend on how they are divided
            said = Exchange(operations=self._operations)
            for sizes in layout.modules.values():
                collect_flags(step, program, sizes.ranks[0], said)
            self._flags = said.flags
        exchange = Exchange(flags=self._flags, operations=self._operations)
        return run_microbatch(step, program, rank, exchange, sample=self._sample)

    def _parameters(
        self, layout: MimoLayout, rank: int, configure: Configure, settings: LayerSettings, depth: int
    ) -> dict[str, ParameterSize]:
        layers = {settings.module: depth} if depth else {}
        sizes = parameter_sizes(layout, rank, with_layers(configure, layout, layers), self._dtype_policy)
        return frozen_sizes(sizes[settings.module], self._program.frozen)


def _attach_and_watch(
    attach: Callable[[RaggedMimoModel, MimoModelInfra], None],
    watch: Watch,
    model: RaggedMimoModel,
    infra: MimoModelInfra,
) -> None:
    attach(model, infra)
    watch(model)


def _as_settings(configure: Configure, settings: LayerSettings, infra: MimoModelInfra) -> MimoModelConfig:
    config = configure(infra)
    transformer = transformer_of(config, settings.module)
    if transformer is None:
        return config
    if settings.recompute is not None:
        transformer.recompute_granularity = "full" if settings.recompute else None
        transformer.recompute_method = "uniform" if settings.recompute else None
        transformer.recompute_num_layers = 1 if settings.recompute else None
    if settings.sequence_parallel is not None and settings.module == LANGUAGE:
        transformer.sequence_parallel = settings.sequence_parallel and settings.tp > 1
    return config


def _parts(runs: list[RankRecording], depths: tuple[int, int], module: str) -> dict[Part, PartCosts]:
    """Activations and work of each part, without the state."""
    few = runs[0]
    found = {}
    for part, segment in _SEGMENTS.items():
        costs = PartCosts(
            kept=_kept(few, segment), transient=_transient(few, segment), work=_work(few, module, segment)
        )
        if part == "layer":
            if depths[0] == depths[1]:
                costs = _scaled(costs, 1 / max(1, depths[0]))
            else:
                more = runs[1]
                costs = PartCosts(
                    kept=_kept(more, segment) - costs.kept,
                    transient=costs.transient,
                    work=_work(more, module, segment) + costs.work.scaled(-1),
                )
        found[part] = costs
    return found


def _kept(run: RankRecording, segment: Segment) -> int:
    """Bytes that the forward pass of a segment leaves for the backward pass."""
    ends = run.recorder.kept
    before = {"before": 0, "layers": ends.get("before", 0), "after": ends.get("layers", 0)}[segment]
    return max(0, ends[segment] - before) if segment in ends else 0


def _transient(run: RankRecording, segment: Segment) -> int:
    """Bytes that a segment needs at most besides all that is kept."""
    kept = run.recorder.kept.get("after", 0)
    peaks = [
        sizes.get("activations", 0)
        for phase, sizes in run.peaks.items()
        if isinstance(phase, Phase) and phase.segment == segment
    ]
    return max(0, max(peaks, default=0) - kept)


def _work(run: RankRecording, module: str, segment: Segment) -> ModuleWork:
    """Work of a segment, without what is sent over bridges and edges, which depends on the layout."""

    def of(pass_: str) -> Work:
        work = run.recorder.work(module, pass_, segment)
        return Work(
            operations=work.operations,
            messages=tuple(each for each in work.messages if each.over.endswith(f" of {module}")),
        )

    return ModuleWork(forward=of("forward"), backward=of("backward"), recompute=of("recompute"))


def _output_bytes(run: RankRecording, module: str) -> int:
    messages = run.recorder.work(module, "forward").messages
    return sum(each.bytes for each in messages if each.over == f"{module} -> {LANGUAGE}")


def _part_of(path: str) -> Part:
    """Part of its module that a parameter belongs to."""
    if ".layers." in path:
        return "layer"
    if ".input_projections." in path or ".output_layer." in path or ".final_layernorm." in path:
        return "last"
    return "first"


def _with_state(costs: PartCosts, sizes: list[ParameterSize], dtype_policy: DtypePolicy, *, layers: int) -> PartCosts:
    """Add weights, gradients and optimizer of one of several equal layers."""
    trained = [size for size in sizes if size.trained]
    experts = sum(size.numel for size in trained if size.is_expert) // layers
    dense = sum(size.numel for size in trained if not size.is_expert) // layers
    per_gradient = 4 if dtype_policy.mixed else dtype_policy.dtype.itemsize
    per_state = 3 * 4 if dtype_policy.mixed else 2 * dtype_policy.dtype.itemsize
    return replace(
        costs,
        weights=sum(each.numel * each.itemsize for each in sizes) // layers,
        gradients=(dense + experts) * per_gradient,
        optimizer=dense * per_state,
        expert_optimizer=experts * per_state,
        gradient_bytes=dense * per_gradient,
        expert_gradient_bytes=experts * per_gradient,
    )


def _scaled(costs: PartCosts, factor: float) -> PartCosts:
    return replace(costs, kept=round(costs.kept * factor), work=costs.work.scaled(factor))


def _between(one: ModuleCosts, two: ModuleCosts, more: int) -> ModuleCosts:
    """Costs of ``1 + more`` samples from those of one and of two, in which everything is linear."""

    def number(a: int, b: int) -> int:
        return a + more * (b - a)

    def part(a: PartCosts, b: PartCosts) -> PartCosts:
        return replace(
            a,
            kept=number(a.kept, b.kept),
            transient=number(a.transient, b.transient),
            work=a.work + (b.work + a.work.scaled(-1)).scaled(more),
        )

    return replace(
        one,
        layer=part(one.layer, two.layer),
        first=part(one.first, two.first),
        last=part(one.last, two.last),
        boundary_bytes=number(one.boundary_bytes, two.boundary_bytes),
        output_bytes=number(one.output_bytes, two.output_bytes),
    )

"""Costs of the modules of a model for any tp, ep and microbatch, from a few steps on fake tensors.

A module runs whole steps with two numbers of layers, on ranks of its own and with one sample. Their difference is the
cost of a layer, and what is left is that of the ends. Arithmetic, activations and messages grow with the samples of a
microbatch; weights do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from megatron.core.distributed import DistributedDataParallelConfig

from lightning_mimo.data.sample_format import Sample
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import (
    LANGUAGE,
    ModuleParallelism,
    ResolvedParallelism,
    dp_step_of_experts,
)
from lightning_mimo.planning.candidate import Variant
from lightning_mimo.planning.costs import (
    Message,
    ModuleCosts,
    ModuleWork,
    Operations,
    PartCosts,
    RankEstimate,
    Work,
)
from lightning_mimo.planning.depths import Depth, depths_of, transformer_of, with_layers
from lightning_mimo.planning.fake_world import as_rank
from lightning_mimo.planning.rank_step import StepSettings, TrainingProgram
from lightning_mimo.planning.step_estimate import step_estimate

_SCALED = ("kept", "transient")
_MICROBATCHES = 2  # of the steps that are run; an encoder keeps both, the language module one


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that is measured.

    Attributes:
        program: the user's code, without recomputation where that can be chosen.
        settings: dtypes of the run; layout and batch are replaced.
        sample: of which microbatches are made.
        rows: module -> rows of its hidden states for the sample.
        tp: module -> tensor-parallel sizes that it supports.
        recomputable: modules for which recomputation can be chosen.
        sequence_parallel: whether the program divides the sequence of the language module.
    """

    program: TrainingProgram
    settings: StepSettings
    sample: Sample
    rows: Mapping[str, int]
    tp: Mapping[str, tuple[int, ...]]
    recomputable: frozenset[str]
    sequence_parallel: bool


class MeasuredCosts:
    """Costs of modules, measured when they are first asked for.

    torch.distributed must not be initialized in this process.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._measured: dict[tuple[int, int, int], dict[str, ModuleCosts]] = {}
        self._scaled: dict[tuple[object, ...], ModuleCosts] = {}

    def __call__(self, name: str, sizes: ResolvedParallelism, variant: Variant, samples: int) -> ModuleCosts:
        """Costs of a module on one rank for a microbatch.

        Raises:
            LayoutError: if the model does not support the sizes.
        """
        recompute = variant.recompute and name in self._subject.recomputable
        key = (name, sizes.tp, sizes.ep, sizes.expt_tp, recompute, samples)
        if key not in self._scaled:
            found = self.measured(sizes.tp, sizes.ep, sizes.expt_tp)[name]
            self._scaled[key] = scaled_costs(recomputed(found) if recompute else found, samples)
        return self._scaled[key]

    def measured(self, tp: int, ep: int = 1, expt_tp: int = 1) -> dict[str, ModuleCosts]:
        """Costs of all modules for one sample; a module that does not support the tp has tp=1."""
        key = (tp, ep, expt_tp)
        if key not in self._measured:
            self._measured[key] = self._measure(*key)
        return self._measured[key]

    def _measure(self, tp: int, ep: int, expt_tp: int) -> dict[str, ModuleCosts]:
        subject = self._subject
        wanted = {
            name: ModuleParallelism(
                tp=tp if tp in each else 1, **({"ep": ep, "expt_tp": expt_tp} if name == LANGUAGE else {})
            )
            for name, each in subject.tp.items()
        }
        dp = dp_step_of_experts(wanted[LANGUAGE])
        modules = {name: replace(each, dp=dp) for name, each in wanted.items()}
        layout = MimoLayout.resolve(modules, world_size=sum(each.size for each in modules.values()))
        settings = replace(
            subject.settings,
            layout=layout,
            ddp=dict.fromkeys(modules, DistributedDataParallelConfig()),
            samples=dp,
            num_microbatches=_MICROBATCHES,
            encoder_run_ahead=0,
        )
        depths: dict[str, Depth] = {}
        widths: dict[str, int] = {}
        for name, sizes in layout.modules.items():
            with as_rank(layout, sizes.ranks.start) as infra:
                config = subject.program.configure(infra)
            depths |= depths_of(config, {name: 0})
            transformer = transformer_of(config, name)
            widths[name] = 0 if transformer is None else transformer.hidden_size
        few, more = (
            self._run(settings, {name: getattr(depth, what) for name, depth in depths.items()})
            for what in ("few", "more")
        )
        return {
            name: self._costs(name, layout, few[name], more[name], depths.get(name), widths[name]) for name in modules
        }

    def _run(self, settings: StepSettings, layers: Mapping[str, int]) -> dict[str, RankEstimate]:
        """Module -> estimate of its rank, with some numbers of layers."""
        program = self._subject.program
        configure = with_layers(program.configure, settings.layout, layers)
        found = step_estimate(settings, replace(program, configure=configure), self._subject.sample, all_layers=True)
        return {name: each for each in found for name in each.stages}

    def _costs(
        self, name: str, layout: MimoLayout, few: RankEstimate, more: RankEstimate, depth: Depth | None, width: int
    ) -> ModuleCosts:
        sizes = layout.modules[name]
        part = partial(_part, name)
        layer = PartCosts() if depth is None else _times(_less(part(more), part(few), 1), 1 / (depth.more - depth.few))
        rest = part(few) if depth is None else _less(part(few), layer, depth.few)
        # Of a layer that runs backward, the gradients are about as large as what it has kept.
        layer = replace(layer, transient=layer.kept)
        first = PartCosts()
        if name == LANGUAGE:  # half of what is left of the weights is the embedding, which has no arithmetic
            first = replace(_times(rest, 0.5), work=ModuleWork(), kept=0, transient=0)
            rest = replace(_less(rest, first, 1), work=rest.work)
        divided = sizes.tp if name == LANGUAGE and self._subject.sequence_parallel else 1
        itemsize = self._subject.settings.dtype_policy.dtype.itemsize
        sent = [each for each in few.work[name].forward.messages if each.operation == "send"]
        return ModuleCosts(
            module=name,
            num_layers=1 if depth is None else depth.layers,
            layer=layer,
            first=first,
            last=replace(rest, kept=0, transient=rest.kept),
            boundary_bytes=self._subject.rows[name] * width * itemsize // divided,
            output_bytes=sum(each.bytes for each in sent),
        )


def _part(name: str, estimate: RankEstimate) -> PartCosts:
    """Everything that a rank with one module has, for one sample."""
    memory = estimate.memory
    work = estimate.work[name]
    return PartCosts(
        weights=memory.weights,
        gradients=memory.gradients,
        optimizer=memory.optimizer,
        gradient_bytes=memory.gradients,
        kept=memory.activations // (1 if name == LANGUAGE else _MICROBATCHES),
        work=ModuleWork(
            forward=_inside(work.forward), backward=_inside(work.backward), recompute=_inside(work.recompute)
        ),
    )


def _inside(work: Work) -> Work:
    """Without what is sent to other modules, which has a price of its own."""
    return replace(work, messages=tuple(each for each in work.messages if each.operation != "send"))


def _less(one: PartCosts, two: PartCosts, times: float) -> PartCosts:
    """``one`` without ``two``, ``times`` times; nothing becomes less than nothing."""
    numbers = {
        field: max(0, round(getattr(one, field) - times * getattr(two, field)))
        for field in PartCosts.__dataclass_fields__
        if field != "work"
    }
    return PartCosts(**numbers, work=_positive(one.work + two.work.scaled(-times)))


def _times(part: PartCosts, factor: float) -> PartCosts:
    numbers = {
        field: round(getattr(part, field) * factor) for field in PartCosts.__dataclass_fields__ if field != "work"
    }
    return PartCosts(**numbers, work=part.work.scaled(factor))


def _positive(work: ModuleWork) -> ModuleWork:
    return ModuleWork(**{phase: _positive_work(getattr(work, phase)) for phase in ("forward", "backward", "recompute")})


def _positive_work(work: Work) -> Work:
    operations = {
        kind: Operations(flops=max(0, each.flops), bytes=max(0, each.bytes), count=max(0, each.count))
        for kind, each in work.operations.items()
    }
    messages = tuple(each for each in work.messages if each.bytes > 0 or each.count > 0)
    return Work(operations=operations, messages=messages)


def recomputed(costs: ModuleCosts) -> ModuleCosts:
    """The costs with full recomputation of every layer, which keeps a layer's input and runs its forward pass again."""
    layer = costs.layer
    again = replace(
        layer,
        kept=costs.boundary_bytes,
        transient=layer.kept + layer.transient,
        work=replace(layer.work, recompute=layer.work.forward),
    )
    return replace(costs, layer=again)


def scaled_costs(costs: ModuleCosts, samples: int) -> ModuleCosts:
    """The costs for a microbatch of ``samples`` samples, from those of one."""
    return replace(
        costs,
        layer=_scaled_part(costs.layer, samples),
        first=_scaled_part(costs.first, samples),
        last=_scaled_part(costs.last, samples),
        boundary_bytes=costs.boundary_bytes * samples,
        output_bytes=costs.output_bytes * samples,
    )


def _scaled_part(part: PartCosts, samples: int) -> PartCosts:
    numbers = {name: getattr(part, name) * samples for name in _SCALED}
    work = ModuleWork(
        forward=_scaled_work(part.work.forward, samples),
        backward=_scaled_work(part.work.backward, samples),
        recompute=_scaled_work(part.work.recompute, samples),
    )
    return replace(part, **numbers, work=work)


def _scaled_work(work: Work, samples: int) -> Work:
    """More samples make kernels and messages larger, not more."""
    operations = {
        kind: Operations(flops=each.flops * samples, bytes=each.bytes * samples, count=each.count)
        for kind, each in work.operations.items()
    }
    messages = tuple(
        Message(over=m.over, operation=m.operation, ranks=m.ranks, bytes=m.bytes * samples, count=m.count)
        for m in work.messages
    )
    return Work(operations=operations, messages=messages)

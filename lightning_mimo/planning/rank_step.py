"""Runs training steps of one rank on fake tensors: with our schedule, Megatron's DDP and the optimizer of the run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.utils import unwrap_model

from lightning_mimo.data.sample_format import Sample
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.layout.pass_order import stages_behind
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.mimo.dtypes import DtypePolicy
from lightning_mimo.mimo.freezing import freeze
from lightning_mimo.mimo.model import RaggedMimoModel, module_and_name
from lightning_mimo.observe.spans import Spans
from lightning_mimo.optim.ddp import wrap_with_ddp
from lightning_mimo.optim.optimizer import MimoTorchOptimizer
from lightning_mimo.optim.step_reduction import DeviceReduction
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.planning.fake_world import Configure, FakeTensorsOnCpu, as_rank, build_on_meta
from lightning_mimo.planning.gpu_kernels import DeviceType, count_gpu_kernels
from lightning_mimo.planning.step_recorder import Exchange, Segment, StepRecorder
from lightning_mimo.schedule.forward_backward import ForwardStep, GlobalBatchSchedule, LossFunction
from lightning_mimo.upstream.torch import _disable_current_modes, tree_map

_AXES = ("tp", "ep", "expt_tp", "tp_ep", "dp", "dp_cp", "expt_dp", "pp", "embd", "mp", "tp_ep_pp", "tp_dp_cp")


@dataclass(frozen=True, kw_only=True)
class TrainingProgram:
    """What a training step runs of the user's code.

    Attributes:
        configure: describes the model, as ``MimoModule.configure_mimo``.
        attach: is given the model of a rank before anything below is called on it.
        microbatches: ``(plan, sample)`` -> the microbatches of the attached model's rank, each made of this sample.
        forward: runs the attached model on a microbatch.
        loss: as for :class:`lightning_mimo.schedule.forward_backward.GlobalBatchSchedule`.
        optimizer: builds the optimizer of the attached model, which is wrapped in DDP.
        frozen: names of frozen modules or prefixes of parameter names, as for ``MimoModule``.
    """

    configure: Configure
    attach: Callable[[RaggedMimoModel, MimoModelInfra], None]
    microbatches: Callable[[RankBatchPlan, Sample], list[Microbatch]]
    forward: ForwardStep
    loss: LossFunction
    optimizer: Callable[[], MimoTorchOptimizer]
    frozen: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings of a run that decide what a step does.

    Attributes:
        layout: resolved layout.
        dtype_policy: dtypes of the run.
        ddp: module name -> options of its DDP wrapper.
        samples: samples of a microbatch over all ranks: global batch size / microbatches.
        num_microbatches: microbatches of a step.
        encoder_run_ahead: as for MimoStrategy.
        device_type: of the run's devices, whose kernels are counted.
    """

    layout: MimoLayout
    dtype_policy: DtypePolicy
    ddp: Mapping[str, DistributedDataParallelConfig]
    samples: int
    num_microbatches: int
    encoder_run_ahead: int = 1
    device_type: DeviceType = "cpu"


@dataclass(frozen=True, kw_only=True)
class RankRecording:
    """What one rank did in a step.

    Attributes:
        peaks: phase -> bytes by purpose at the peak of that phase.
        recorder: operations and messages of ``microbatches`` microbatches.
        microbatches: microbatches that were run; fewer than in a real step where memory no longer grows.
        frozen: modules that have no trained parameter on this rank.
    """

    peaks: Mapping[Hashable, Mapping[str, int]]
    recorder: StepRecorder
    microbatches: int
    frozen: tuple[str, ...] = ()


class _LoneSchedule(GlobalBatchSchedule):
    """The schedule of a rank that cannot ask others for the names of metrics."""

    def _names_of_metrics(self, results: list[Any], *, training: bool) -> list[str]:
        return sorted(results[0][2]) if self.computes_loss else []


def collect_flags(settings: StepSettings, program: TrainingProgram, rank: int, exchange: Exchange) -> frozenset[str]:
    """Set up one rank without running anything, so that other ranks know what it trains.

    Returns:
        The modules on this rank that have no frozen parameter here.
    """
    exchange.collecting = True
    with _set_up(settings, program, rank, exchange) as (_, model, _):
        program.optimizer()
        trained = frozenset(name for name in settings.layout.modules_on(rank) if _is_trained(model, name, all))
    exchange.collecting = False
    return trained


def run_rank(
    settings: StepSettings, program: TrainingProgram, rank: int, exchange: Exchange, *, sample: Sample
) -> RankRecording:
    """Run two steps of one rank, of which the second is recorded.

    torch.distributed must not be initialized in this process. :func:`collect_flags` must have been called for a rank of
    every stage, and earlier stages of an encoder must have been run.

    Args:
        settings: of the run.
        program: the user's code.
        rank: global rank.
        exchange: shared by all ranks.
        sample: of which every microbatch is made.
    """
    number = min(settings.num_microbatches, _until_steady(settings, rank))
    with _set_up(settings, program, rank, exchange) as (recorder, model, schedule):
        optimizer = program.optimizer()
        for microbatches in (1, number):
            batch = _batch(settings, program, rank, sample, number=microbatches)
            recorder.ledger.assign(_tensors_of(batch), "batch")
            if microbatches == number:
                recorder.counting = True
                recorder.ledger.begin()
            schedule.zero_grad()
            optimizer.outcome = None
            optimizer.reduction = _train(schedule, program, recorder, batch, optimizer)
            optimizer.step()
            if not recorder.counting:
                _assign_optimizer(recorder, optimizer)
                _assign_state(recorder, model)
        peaks = dict(recorder.ledger.peaks)
        frozen = tuple(name for name in settings.layout.modules_on(rank) if not _is_trained(model, name, any))
    return RankRecording(peaks=peaks, recorder=recorder, microbatches=number, frozen=frozen)


def _until_steady(settings: StepSettings, rank: int) -> int:
    """Microbatches after which a rank holds no more with every further one.

    By then it has as many in flight as it has stages behind it, and holds as many gradients that are being sent as it
    ever does; see :class:`lightning_mimo.comm.p2p.P2PLink`.
    """
    layout, ahead = settings.layout, settings.encoder_run_ahead
    if layout.colocated:
        return 2
    (name,) = layout.modules_on(rank)
    stage = layout.modules[name].coordinates(rank)["pp"]
    behind = stages_behind(layout.modules, name, stage, encoder_run_ahead=ahead)
    if stage:
        sending = 2
    elif name == LANGUAGE:
        sending = 2 + ahead
    else:
        sending = 0
    return behind + 1 + sending


def run_microbatch(
    settings: StepSettings, program: TrainingProgram, rank: int, exchange: Exchange, *, sample: Sample
) -> RankRecording:
    """Run forward and backward of one microbatch, without an optimizer; as :func:`run_rank` otherwise."""
    with _set_up(settings, program, rank, exchange) as (recorder, model, schedule):
        _assign_state(recorder, model)
        batch = _batch(settings, program, rank, sample, number=1)
        recorder.ledger.assign(_tensors_of(batch), "batch")
        recorder.counting = True
        schedule.zero_grad()
        _train(schedule, program, recorder, batch, None)
        peaks = dict(recorder.ledger.peaks)
    return RankRecording(peaks=peaks, recorder=recorder, microbatches=1)


def _train(
    schedule: GlobalBatchSchedule,
    program: TrainingProgram,
    recorder: StepRecorder,
    batch: list[Microbatch],
    optimizer: MimoTorchOptimizer | None,
) -> DeviceReduction:
    return schedule.train(
        batch,
        partial(_forward, recorder, program.forward),
        partial(_loss, recorder, program.loss),
        optimizer=None if optimizer is None else optimizer.mimo,
    )


@contextmanager
def _set_up(
    settings: StepSettings, program: TrainingProgram, rank: int, exchange: Exchange
) -> Iterator[tuple[StepRecorder, RaggedMimoModel, GlobalBatchSchedule]]:
    spans = Spans()
    with as_rank(settings.layout, rank, spans=spans) as infra:
        model = build_on_meta(program.configure, infra, settings.dtype_policy)
        mode = FakeTensorsOnCpu()
        recorder = StepRecorder(mode, spans, exchange, _axes_of(infra))
        with mode, recorder:
            _make_fake(model)
            freeze(model, infra, program.frozen)
            program.attach(model, infra)
            wrap_with_ddp(model, infra, settings.ddp, settings.dtype_policy)
            schedule = _LoneSchedule(model, infra, encoder_run_ahead=settings.encoder_run_ahead)
            _follow_segments(model, infra, recorder)
            balance_experts(model)
            if settings.device_type == "cuda":
                count_gpu_kernels(model)
            model.train()
            yield recorder, model, schedule


def _forward(recorder: StepRecorder, forward: ForwardStep, microbatch: Microbatch) -> Any:
    recorder.segment = "before"
    output = forward(microbatch)
    recorder.segment = "after"  # until the backward pass reaches the layers
    recorder.end_segment("after")
    return output


def _loss(recorder: StepRecorder, loss: LossFunction, output: Any, microbatch: Microbatch) -> Any:
    result = loss(output, microbatch)
    recorder.end_segment("after")
    return result


def _batch(
    settings: StepSettings, program: TrainingProgram, rank: int, sample: Sample, *, number: int
) -> list[Microbatch]:
    plan = RankBatchPlan.build(
        settings.layout, rank, global_batch_size=settings.samples * number, num_microbatches=number
    )
    with _disable_current_modes():
        batch = program.microbatches(plan, sample)
    dtype = settings.dtype_policy.dtype

    def fake(value: Any, to: torch.dtype | None = None) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return torch.empty(value.shape, dtype=to or value.dtype)

    made = []
    for microbatch in batch:
        each: Any = {key: tree_map(fake, value) for key, value in microbatch.items()}
        each["modality_inputs"] = tree_map(partial(fake, to=dtype), microbatch["modality_inputs"])
        made.append(each)
    return made


def _is_trained(model: RaggedMimoModel, name: str, how_many: Callable[[Iterator[bool]], bool]) -> bool:
    return how_many(parameter.requires_grad for parameter in module_and_name(model, name)[0].parameters())


def _tensors_of(batch: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map(lambda value: found.append(value) if isinstance(value, torch.Tensor) else None, batch)
    return found


def _make_fake(model: torch.nn.Module) -> None:
    """Replace tensors on the meta device by fake ones on the CPU."""
    made: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> Any:
        if id(tensor) not in made:
            is_whole = not tensor.is_floating_point()
            new = (
                torch.zeros(tensor.shape, dtype=tensor.dtype)
                if is_whole
                else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            )
            if isinstance(tensor, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
                new.__dict__.update(tensor.__dict__)
            made[id(tensor)] = tensor, new  # the old one is kept, so that its id is not used again
        return made[id(tensor)][1]

    for module in model.modules():
        for held in (module._parameters, module._buffers, module.__dict__):
            for name, value in held.items():
                if isinstance(value, torch.Tensor) and value.device.type == "meta":
                    held[name] = fake(value)


def _assign_optimizer(recorder: StepRecorder, optimizer: MimoTorchOptimizer) -> None:
    """Tell the ledger what tensors the optimizer keeps from step to step."""
    ledger = recorder.ledger
    for _, inner in optimizer.mimo._inner():
        for group in inner.optimizer.param_groups:
            ledger.assign(group["params"], "optimizer")
        for state in inner.optimizer.state.values():
            ledger.assign((value for value in state.values() if isinstance(value, torch.Tensor)), "optimizer")


def _assign_state(recorder: StepRecorder, model: RaggedMimoModel) -> None:
    """Tell the ledger which tensors are weights and their gradients."""
    ledger = recorder.ledger
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            for buffer in (*module.buffers, *module.expert_parallel_buffers):
                ledger.assign([buffer.grad_data], "gradients")
                if buffer.param_data is not None:
                    ledger.assign([buffer.param_data], "weights")
    ledger.assign(model.parameters(), "weights")
    ledger.assign(model.buffers(), "weights")


def _axes_of(infra: MimoModelInfra) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name of every process group of this rank -> its axis, and its ranks."""
    axes: dict[str, tuple[str, tuple[int, ...]]] = {}
    world = dist.group.WORLD
    assert world is not None
    for module, groups in infra.pg_collections.items():
        for axis in _AXES:
            group = getattr(groups, axis, None)
            if group is not None:
                ranks = tuple(dist.get_process_group_ranks(group))
                axes.setdefault(group.group_name, (f"{axis} of {module}", ranks))
    axes[world.group_name] = "world", tuple(range(infra.layout.world_size))
    return axes


def _follow_segments(model: RaggedMimoModel, infra: MimoModelInfra, recorder: StepRecorder) -> None:
    """Set the recorder's segment as passes go through the modules and their layers."""

    def to(segment: Segment, *unused: Any) -> None:
        recorder.segment = segment

    def when_reached(segment: Segment, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(partial(to, segment))

    def before_layers(block: Any, args: Any, kwargs: Any) -> None:
        when_reached("before", args[0] if args else kwargs.get("hidden_states"))
        recorder.end_segment("before")
        to("layers")

    def after_layers(block: Any, args: Any, output: Any) -> None:
        when_reached("layers", output)
        recorder.end_segment("layers")
        recorder.layer_output = output.nbytes if isinstance(output, torch.Tensor) else 0
        to("after")

    def after_module(module: Any, args: Any, output: Any) -> None:
        when_reached("after", output[0] if isinstance(output, tuple) else output)
        to("before")

    for module in model.modules():
        if isinstance(module, TransformerBlock):
            module.register_forward_pre_hook(before_layers, with_kwargs=True)
            module.register_forward_hook(after_layers)
    for name in infra.participating_modules:
        if name != LANGUAGE and infra.colocated:
            unwrap_model(module_and_name(model, name)[0]).register_forward_hook(after_module)


def balance_experts(model: RaggedMimoModel) -> None:
    """Let routers send every expert equally many tokens, because fake tensors do not say which."""

    def balanced(router: Any, args: Any, output: Any) -> Any:
        probabilities, chosen = output
        tokens, experts = chosen.shape
        first = torch.arange(tokens).unsqueeze(1) * router.topk
        picked = (first + torch.arange(router.topk)) % experts
        return probabilities, torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, picked, True)

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(balanced)

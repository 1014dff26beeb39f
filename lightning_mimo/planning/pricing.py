"""Prices a candidate: seconds of passes, transfers, reductions and updates, from costs and hardware.

A kernel takes as long as its arithmetic at the peak times an efficiency, or as long as its bytes, whichever is longer;
a pass takes at least its kernels times the time to launch one. Layers that were timed take as long as that. Collectives
of tensor and expert parallelism stand in the way of computation; those of data parallelism overlap the last backward
pass if the run lets them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_mimo.layout.module_parallelism import LANGUAGE, ResolvedParallelism
from lightning_mimo.layout.pass_order import stages_behind
from lightning_mimo.layout.routes import routes_between
from lightning_mimo.planning.candidate import Candidate, Model
from lightning_mimo.planning.costs import Message, ModuleCosts, PartCosts, Work
from lightning_mimo.planning.hardware import Hardware, Link

Phase = Literal["forward", "backward", "recompute"]

BUCKET_BYTES = 4 * 40_000_000
"""Bytes of gradients that Megatron's DistributedDataParallel reduces at once, if they are float32."""


@dataclass(frozen=True, kw_only=True)
class StagePrice:
    """Seconds and bytes of one pipeline stage of a module on one rank.

    Attributes:
        module: the module.
        stage: the pipeline stage.
        ranks: number of ranks of the stage, over all replicas.
        forward: seconds of the forward pass of a microbatch.
        backward: seconds of its backward pass, with recomputation.
        reduce: seconds of the gradient reduction.
        last_bucket: seconds of the part of it that begins after the last backward pass.
        update: seconds of the update and of the all-gather of weights.
        state: bytes of weights, gradients and optimizer.
        kept: bytes of activations that a microbatch in flight keeps.
        transient: bytes that are needed while a pass runs.
        flops: of forward and backward of one microbatch without recomputation.
    """

    module: str
    stage: int
    ranks: int
    forward: float
    backward: float
    reduce: float
    last_bucket: float
    update: float
    state: int
    kept: int
    transient: int
    flops: int


def price_stages(candidate: Candidate, model: Model, hardware: Hardware) -> list[StagePrice]:
    """Price every pipeline stage of every module of a candidate, in the order of the layout."""
    return [price for name in candidate.layout.modules for price in price_module(candidate, name, model, hardware)]


def price_module(candidate: Candidate, name: str, model: Model, hardware: Hardware) -> tuple[StagePrice, ...]:
    """Price the pipeline stages of one module. All stages but the first and the last are equal."""
    sizes, costs = candidate.layout.modules[name], costs_of(candidate, name, model)
    middle = _price_stage(candidate, name, 1, costs, model, hardware) if sizes.pp > 2 else None
    return tuple(
        replace(middle, stage=stage)
        if middle is not None and 0 < stage < sizes.pp - 1
        else _price_stage(candidate, name, stage, costs, model, hardware)
        for stage in range(sizes.pp)
    )


def costs_of(candidate: Candidate, name: str, model: Model) -> ModuleCosts:
    """Costs of a module for the microbatches of a candidate."""
    sizes = candidate.layout.modules[name]
    samples = model.global_batch_size // (candidate.num_microbatches * sizes.dp)
    return model.costs(name, sizes, candidate.variant, samples)


def _price_stage(
    candidate: Candidate, name: str, stage: int, costs: ModuleCosts, model: Model, hardware: Hardware
) -> StagePrice:
    sizes = candidate.layout.modules[name]
    known = model.stage_layers(name, sizes.pp) if model.stage_layers is not None and costs.num_layers else None
    layers = costs.num_layers / sizes.pp if known is None else known[stage]
    parts = list(_parts(costs, stage, sizes.pp, layers))

    def total(what: str) -> float:
        return sum(times * getattr(part, what) for times, part in parts)

    def seconds(phase: Phase) -> float:
        return sum(times * _seconds(part, phase, sizes, model, hardware) for times, part in parts)

    weights, gradients = total("weights"), total("gradients")
    optimizer = total("optimizer") + total("expert_optimizer")
    if candidate.distributed_optimizer:
        optimizer = total("optimizer") / sizes.dp + total("expert_optimizer") / sizes.expt_dp
    reduce, last_bucket, gather = _reduction(candidate, sizes, parts, hardware)
    update = (gradients + 2 * optimizer + weights) / hardware.memory_bandwidth if gradients else 0.0
    return StagePrice(
        module=name,
        stage=stage,
        ranks=sizes.size // sizes.pp,
        forward=seconds("forward"),
        backward=seconds("backward") + seconds("recompute"),
        reduce=reduce,
        last_bucket=last_bucket,
        update=update + gather,
        state=round(weights + gradients + optimizer),
        kept=round(total("kept")),
        transient=max(part.transient for _, part in parts),
        flops=round(sum(times * (part.work.forward.flops + part.work.backward.flops) for times, part in parts)),
    )


def _parts(costs: ModuleCosts, stage: int, pp: int, layers: float) -> Iterator[tuple[float, PartCosts]]:
    """How often a stage has each part."""
    yield layers, costs.layer
    if stage == 0:
        yield 1, costs.first
    if stage == pp - 1:
        yield 1, costs.last


def _seconds(part: PartCosts, phase: Phase, sizes: ResolvedParallelism, model: Model, hardware: Hardware) -> float:
    """Seconds of a pass of a part on one rank."""
    work: Work = getattr(part.work, phase)
    messages = sum(_message(each, sizes, hardware) for each in work.messages)
    if part.seconds is None:
        return _computing(work, model, hardware) + messages
    if phase == "recompute":  # forward passes of as many of the layers as are recomputed
        return part.seconds.forward * work.flops / max(part.work.forward.flops, 1) + messages
    return getattr(part.seconds, phase) + messages


def _computing(work: Work, model: Model, hardware: Hardware) -> float:
    """Seconds of operations whose time was not measured."""
    peak = hardware.peak(model.dtype)
    rates = {"matmul": peak * hardware.matmul_efficiency, "attention": peak * hardware.attention_efficiency}
    seconds, count = 0.0, 0
    for kind, each in work.operations.items():
        computing = each.flops / rates[kind] if kind in rates else 0.0
        seconds += max(computing, each.bytes / hardware.memory_bandwidth)
        count += each.count
    return max(seconds, count * hardware.launch)


def _message(message: Message, sizes: ResolvedParallelism, hardware: Hardware) -> float:
    """Seconds of the messages of tensor or expert parallelism of a pass."""
    ranks = len(message.ranks)
    if ranks < 2 or not message.count:
        return 0.0
    span = message.ranks[-1] - message.ranks[0] + 1
    ring = _link_of_group(sizes, ranks, (span - 1) // (ranks - 1), hardware)
    link = hardware.within_node if _in_one_node(sizes, span, hardware) else hardware.between_nodes
    match message.operation:
        case "all_reduce":
            return ring.all_reduce(message.bytes, ranks, messages=message.count)
        case "all_gather" | "reduce_scatter":
            return ring.all_gather(message.bytes, ranks, messages=message.count)
        case "all_to_all":
            return link.all_gather(message.bytes, ranks, messages=message.count)
        case _:
            return message.count * link.latency + message.bytes / link.bandwidth


def _in_one_node(sizes: ResolvedParallelism, span: int, hardware: Hardware) -> bool:
    """Whether groups of ``span`` consecutive ranks of a module lie in one node each."""
    first, last = (rank // hardware.devices_per_node for rank in (sizes.ranks.start, sizes.ranks.stop - 1))
    if first == last:
        return True
    return hardware.devices_per_node % span == 0 and sizes.rank_offset % span == 0


def _reduction(
    candidate: Candidate, sizes: ResolvedParallelism, parts: list[tuple[float, PartCosts]], hardware: Hardware
) -> tuple[float, float, float]:
    """Seconds of the reduction, of its part after the last backward pass, and of the all-gather of weights."""
    dense, experts = (
        sum(times * getattr(part, what) for times, part in parts)
        for what in ("gradient_bytes", "expert_gradient_bytes")
    )
    trained = sum(times * part.gradients for times, part in parts)
    weights = sum(times * part.weights for times, part in parts)
    reduce = gather = 0.0
    for size, ranks, stride in ((dense, sizes.dp, sizes.tp), (experts, sizes.expt_dp, sizes.expt_tp * sizes.ep)):
        if ranks == 1 or not size:
            continue
        link = _link_of_group(sizes, ranks, stride, hardware)
        buckets = math.ceil(size / BUCKET_BYTES)
        if candidate.distributed_optimizer:
            reduce += link.all_gather(size, ranks, messages=buckets)
            gather += link.all_gather(weights * size / max(trained, 1), ranks, messages=buckets)
        else:
            reduce += link.all_reduce(size, ranks, messages=buckets)
    last = reduce * min(1.0, BUCKET_BYTES / max(dense + experts, 1)) if candidate.overlap else reduce
    return reduce, last, gather


def _link_of_group(sizes: ResolvedParallelism, ranks: int, stride: int, hardware: Hardware) -> Link:
    """Connection of groups whose ranks are ``stride`` apart, for collectives in rings.

    Several ranks of a group in one node use the adapters of all of them.
    """
    if _in_one_node(sizes, ranks * stride, hardware):
        return hardware.within_node
    together = min(ranks, max(1, hardware.devices_per_node // stride))
    bandwidth = min(hardware.within_node.bandwidth, together * hardware.between_nodes.bandwidth)
    return Link(bandwidth=bandwidth, latency=hardware.between_nodes.latency)


def bridge_seconds(candidate: Candidate, encoder: str, model: Model, hardware: Hardware) -> float:
    """Seconds until the embeddings of a microbatch have arrived at the language module, or their gradients back.

    A rank sends its part to every rank that needs it, one after the other, and a rank receives the parts of several
    replicas in the same way.
    """
    modules = candidate.layout.modules
    mine, language = modules[encoder], modules[LANGUAGE]
    size = costs_of(candidate, encoder, model).output_bytes
    if candidate.layout.colocated:
        if mine.dp == language.dp:
            return 0.0
        ranks = max(mine.dp, language.dp) // min(mine.dp, language.dp)
        whole = size * (ranks if mine.dp > language.dp else 1)
        link = (
            hardware.within_node
            if _in_one_node(mine, min(mine.size, ranks * mine.tp), hardware)
            else (hardware.between_nodes)
        )
        return link.all_gather(whole, ranks)
    out = routes_between(mine, language, rank=mine.rank_at(tp=0, dp=0, pp=mine.pp - 1), stage=0)
    sent = sum(len(part) for part in out.sends) * size / out.parts
    back = routes_between(language, mine, rank=language.rank_at(tp=0, dp=0, pp=0), stage=mine.pp - 1)
    received = back.parts * size / out.parts
    pairs = [(mine.rank_at(tp=0, dp=0, pp=mine.pp - 1), peer) for peer in out.receivers]
    link = _link_of_pairs(pairs, hardware)
    return link.seconds(max(sent, received))


def hop_seconds(candidate: Candidate, name: str, costs: ModuleCosts, stage: int, hardware: Hardware) -> float:
    """Seconds until a microbatch has arrived from a stage at the next one."""
    sizes = candidate.layout.modules[name]
    pair = (sizes.rank_at(tp=0, dp=0, pp=stage), sizes.rank_at(tp=0, dp=0, pp=stage + 1))
    return _link_of_pairs([pair], hardware).seconds(costs.boundary_bytes)


def _link_of_pairs(pairs: list[tuple[int, int]], hardware: Hardware) -> Link:
    node = hardware.devices_per_node
    return hardware.within_node if all(a // node == b // node for a, b in pairs) else hardware.between_nodes


def sum_seconds(world_size: int, hardware: Hardware) -> float:
    """Seconds of the all-reduce of losses and norms over all ranks, which is one small message."""
    link = hardware.link(world_size)
    return 2 * link.latency * math.log2(world_size) if world_size > 1 else 0.0


def memory_by_stage(candidate: Candidate, prices: Sequence[StagePrice]) -> Mapping[str, int]:
    """Peak bytes on a rank of each stage: ``language stage 0`` and so on, or all modules together where colocated."""
    if candidate.layout.colocated:
        peak = sum(price.state + price.kept for price in prices) + max(price.transient for price in prices)
        return {" and ".join(candidate.layout.modules): peak}
    return {f"{price.module} stage {price.stage}": _peak(candidate, price) for price in prices}


def peak_memory(candidate: Candidate, prices: Sequence[StagePrice]) -> int:
    """Peak bytes on the rank that needs the most."""
    if candidate.layout.colocated:
        return max(memory_by_stage(candidate, prices).values())
    # Of equal stages the first one keeps the most microbatches.
    modules = candidate.layout.modules
    return max(
        _peak(candidate, price) for price in prices if price.stage < 2 or price.stage == modules[price.module].pp - 1
    )


def _peak(candidate: Candidate, price: StagePrice) -> int:
    """A stage keeps one microbatch for each stage behind it, and the one that it works on."""
    modules, ahead = candidate.layout.modules, candidate.encoder_run_ahead
    behind = stages_behind(modules, price.module, price.stage, encoder_run_ahead=ahead)
    return price.state + min(behind + 1, candidate.num_microbatches) * price.kept + price.transient

"""What a training step costs on each kind of rank: memory by purpose, arithmetic by kind, and what is sent over what.

Plain numbers, without tensors. ``step_estimate`` measures them; ``layer_costs`` gives those of single layers, from
which a planner computes any number of stages, replicas and microbatches by arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

OperationKind = Literal["matmul", "attention", "elementwise"]
"""``matmul`` are all products of matrices and convolutions, ``attention`` the fused attention kernels, and
``elementwise`` everything else, whose time is that of the memory."""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Operations of one kind on one rank.

    Attributes:
        flops: floating-point operations, two for a multiplication and an addition; 0 for ``elementwise``.
        bytes: bytes that the kernels read and write in the device's memory, every operand and result once per kernel.
        count: number of kernels.
    """

    flops: int = 0
    bytes: int = 0
    count: int = 0

    def __add__(self, other: Operations) -> Operations:
        return Operations(
            flops=self.flops + other.flops, bytes=self.bytes + other.bytes, count=self.count + other.count
        )

    def scaled(self, factor: float) -> Operations:
        """The operations ``factor`` times, rounded."""
        return Operations(
            flops=round(self.flops * factor), bytes=round(self.bytes * factor), count=round(self.count * factor)
        )


@dataclass(frozen=True, kw_only=True)
class Message:
    """What one rank sends in one kind of collective or over one edge.

    Attributes:
        over: axis or edge: ``tp of language``, ``dp of images``, ``ep of language``, ``world``, ``images -> language``,
            ``language stage 0 -> 1``, the last two with ``, backward`` for gradients.
        operation: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all``, ``broadcast`` or ``send``.
        ranks: global ranks of the group; of an edge this rank and its peers.
        bytes: sum of the sizes of the tensors, of an all-gather its result and of a reduce-scatter its input: a ring
            sends (n - 1) / n of it, and twice that for an all-reduce. Of ``send`` the bytes that leave the rank.
        count: number of collectives or messages.
    """

    over: str
    operation: str
    ranks: tuple[int, ...]
    bytes: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """Arithmetic and messages of one phase on one rank.

    Attributes:
        operations: by kind; a kind that does not occur may be missing.
        messages: at most one for each group or edge and operation.
    """

    operations: Mapping[OperationKind, Operations] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()

    @property
    def flops(self) -> int:
        """Floating-point operations of all kinds."""
        return sum(each.flops for each in self.operations.values())

    @property
    def bytes(self) -> int:
        """Bytes that kernels read and write."""
        return sum(each.bytes for each in self.operations.values())

    def __add__(self, other: Work) -> Work:
        kinds = dict.fromkeys((*self.operations, *other.operations))
        none = Operations()
        return Work(
            operations={kind: self.operations.get(kind, none) + other.operations.get(kind, none) for kind in kinds},
            messages=add_messages((*self.messages, *other.messages)),
        )

    def scaled(self, factor: float) -> Work:
        """The work ``factor`` times, rounded. Negative factors subtract; what is left of a message is 0, not gone."""
        return Work(
            operations={kind: each.scaled(factor) for kind, each in self.operations.items()},
            messages=tuple(
                Message(
                    over=each.over,
                    operation=each.operation,
                    ranks=each.ranks,
                    bytes=round(each.bytes * factor),
                    count=round(each.count * factor),
                )
                for each in self.messages
            ),
        )


def add_messages(messages: Iterable[Message]) -> tuple[Message, ...]:
    """One message for each group or edge and operation, with the sums of bytes and counts."""
    sums: dict[tuple[str, str, tuple[int, ...]], tuple[int, int]] = {}
    for each in messages:
        key = each.over, each.operation, each.ranks
        size, count = sums.get(key, (0, 0))
        sums[key] = size + each.bytes, count + each.count
    return tuple(
        Message(over=over, operation=operation, ranks=ranks, bytes=size, count=count)
        for (over, operation, ranks), (size, count) in sums.items()
    )


@dataclass(frozen=True, kw_only=True)
class ModuleWork:
    """Work of one module on one rank for one microbatch.

    Attributes:
        forward: of the forward pass and, on the last stage of the language module, of the loss.
        backward: of the backward pass without what is recomputed.
        recompute: of the forward passes that activation recomputation runs again in the backward pass.
    """

    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)
    recompute: Work = field(default_factory=Work)

    def __add__(self, other: ModuleWork) -> ModuleWork:
        return ModuleWork(
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            recompute=self.recompute + other.recompute,
        )

    def scaled(self, factor: float) -> ModuleWork:
        """The work ``factor`` times, rounded."""
        return ModuleWork(
            forward=self.forward.scaled(factor),
            backward=self.backward.scaled(factor),
            recompute=self.recompute.scaled(factor),
        )


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of tensors on one rank at the moment of a step when they are most, and of communicators.

    Attributes:
        weights: parameters and buffers of the model.
        gradients: gradient buffers of Megatron's DDP.
        optimizer: moments and, in mixed precision, float32 copies of the weights.
        batch: this rank's microbatches of the global batch, all of which are on the device.
        activations: everything else: what the backward passes need, and what kernels work on at that moment.
        communicators: buffers of NCCL, which there are on GPUs only, see
            :attr:`lightning_mimo.layout.communicators.Communicator.nbytes`.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    batch: int = 0
    activations: int = 0
    communicators: int = 0

    @property
    def tensors(self) -> int:
        """Bytes of all tensors."""
        return self.weights + self.gradients + self.optimizer + self.batch + self.activations

    @property
    def total(self) -> int:
        """Sum of all bytes."""
        return self.tensors + self.communicators


@dataclass(frozen=True, kw_only=True)
class RankEstimate:
    """One kind of rank: the ranks that hold the same pipeline stages of the same modules.

    Attributes:
        stages: module -> its pipeline stage on these ranks, counted from 0; several modules where they are colocated.
        ranks: the ranks.
        memory: at the peak.
        peak_at: when that is, such as ``backward of language, microbatch 2``.
        work: module -> its work for one microbatch.
        step: work of the rest of a step: reductions, gradient norms, the update and the gathering of weights.
        num_microbatches: microbatches of a step.
    """

    stages: Mapping[str, int]
    ranks: range
    memory: StepMemory
    peak_at: str
    work: Mapping[str, ModuleWork]
    step: Work
    num_microbatches: int

    @property
    def forward_flops(self) -> int:
        """Of all modules on the rank in one step."""
        return self.num_microbatches * sum(each.forward.flops for each in self.work.values())

    @property
    def backward_flops(self) -> int:
        """Of all modules on the rank in one step, without recomputation."""
        return self.num_microbatches * sum(each.backward.flops for each in self.work.values())

    @property
    def recompute_flops(self) -> int:
        """Of all modules on the rank in one step."""
        return self.num_microbatches * sum(each.recompute.flops for each in self.work.values())


@dataclass(frozen=True, kw_only=True)
class PassSeconds:
    """Measured seconds of a rank's own work for one microbatch, without messages.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass, without recomputation.
    """

    forward: float
    backward: float

    def least(self, other: PassSeconds) -> PassSeconds:
        """The least of two measurements, of each pass."""
        return PassSeconds(forward=min(self.forward, other.forward), backward=min(self.backward, other.backward))

    def towards(self, other: PassSeconds, times: float) -> PassSeconds:
        """Go from these seconds towards others, or ``times`` as far; more work never takes less."""
        return PassSeconds(
            forward=self.forward + times * max(0.0, other.forward - self.forward),
            backward=self.backward + times * max(0.0, other.backward - self.backward),
        )


@dataclass(frozen=True, kw_only=True)
class PartCosts:
    """Costs of a part of a module on one rank: of one layer, or of what the first or the last stage has besides layers.

    Attributes:
        weights: bytes of parameters and buffers.
        gradients: bytes of gradient buffers.
        optimizer: bytes of the optimizer's state of parameters that all replicas hold, before the distributed optimizer
            divides it by dp.
        expert_optimizer: the same of experts, which it divides by expt_dp.
        gradient_bytes: bytes that are reduced over dp in a step; of experts in ``expert_gradient_bytes``, over expt_dp.
        expert_gradient_bytes: see ``gradient_bytes``.
        kept: bytes of activations that one microbatch keeps from its forward to its backward pass.
        transient: bytes that are needed besides while the part itself runs forward or backward, at most.
        work: for one microbatch.
        seconds: that ``work`` takes on this machine's device; ``None`` where it was not measured.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    expert_optimizer: int = 0
    gradient_bytes: int = 0
    expert_gradient_bytes: int = 0
    kept: int = 0
    transient: int = 0
    work: ModuleWork = field(default_factory=ModuleWork)
    seconds: PassSeconds | None = None


@dataclass(frozen=True, kw_only=True)
class ModuleCosts:
    """Costs of one module for given tp, ep, expt_tp, sequence parallelism, recomputation and microbatch.

    A stage with ``n`` layers takes ``n * layer``, plus ``first`` on the first and ``last`` on the last stage. On ``m``
    microbatches in flight it keeps ``m`` times ``kept`` of these, and needs the largest ``transient`` once.

    Attributes:
        module: name of the module.
        num_layers: layers over all stages.
        layer: one layer, averaged over those that are recomputed and those that are not.
        first: embedding; of an encoder, of its patches.
        last: last norm, head and loss; of an encoder, the projector.
        boundary_bytes: bytes that one stage sends the next for a microbatch, on each rank.
        output_bytes: bytes of what the module gives for a microbatch: embeddings for the language module, on a replica.
    """

    module: str
    num_layers: int
    layer: PartCosts
    first: PartCosts
    last: PartCosts
    boundary_bytes: int
    output_bytes: int

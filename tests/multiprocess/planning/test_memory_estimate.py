"""What a dry run counts in one process is what real ranks hold after a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_mimo import ModuleParallelism
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.model import module_and_name
from lightning_mimo.optim.ddp import options_by_module
from lightning_mimo.planning.memory_estimate import MemoryEstimate, memory_estimate
from tests.parity.cases import DENSE_CLIPS, apart, task, together
from tests.parity.layouts import Layout, ddp_config, train
from tests.parity.model import ParityModule
from tests.parity.oracle import Task
from tests.support.rank_pool import RankPool

DISTRIBUTED = {"use_distributed_optimizer": True}
CASES: dict[str, tuple[Task, Layout]] = {
    "one_rank": (task(), together(ModuleParallelism(), ModuleParallelism())),
    "mixed-distributed-pipelined": (
        task(precision="bf16-mixed"),
        apart(ModuleParallelism(tp=2, dp=2), ModuleParallelism(pp=2, dp=2), ddp=DISTRIBUTED),
    ),
    "experts": (
        task(experts=4, precision="32-true"),
        apart(ModuleParallelism(), ModuleParallelism(dp=4, ep=2, expt_tp=2), num_microbatches=3),
    ),
    "experts-distributed-sequence_parallel": (
        task(experts=4, precision="bf16-mixed"),
        apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2, dp=2, ep=2), sequence_parallel=True, ddp=DISTRIBUTED),
    ),
    "two_encoders-frozen": (
        task(audio=True, clip_encoder=None, samples=DENSE_CLIPS, frozen=("images.encoders", "language.embedding")),
        apart(ModuleParallelism(pp=2), ModuleParallelism(pp=2), ModuleParallelism(tp=2)),
    ),
    "colocated-tied-llama": (
        task(tied=True, style="llama", precision="bf16-true"),
        together(ModuleParallelism(dp=4), ModuleParallelism(tp=2, dp=2), num_microbatches=3),
    ),
    "tied-pipelined": (task(tied=True), apart(ModuleParallelism(), ModuleParallelism(tp=2, pp=2))),
}


def expected(chosen: Task, layout: Layout) -> MemoryEstimate:
    resolved = MimoLayout.resolve(layout.modules, world_size=layout.ranks, colocate=layout.colocate)
    module = ParityModule(chosen.model, sequence_parallel=layout.sequence_parallel)
    return memory_estimate(
        resolved,
        module.configure_mimo,
        dtype_policy=chosen.dtype_policy,
        ddp=options_by_module(ddp_config(layout), resolved.modules),
        frozen=module.frozen,
    )


def real(chosen: Task, layout: Layout) -> tuple[int, int, int, int]:
    """Parameters, and bytes of weights, gradients and optimizer, on this rank after a step."""
    _, module, strategy = train(replace(chosen, steps=1), layout)
    infra = strategy.infra
    wrapped = [module_and_name(module.model, name)[0] for name in infra.participating_modules]
    parameters = [parameter for each in wrapped for parameter in each.parameters()]
    buffers = [buffer for each in wrapped for buffer in each.buffers + each.expert_parallel_buffers]
    optimizer = 0
    for inner in module.optimizers(use_pl_optimizer=False).mimo.module_infos.values():
        for part in inner.optimizer.chained_optimizers if inner.optimizer else ():
            if part.optimizer is None:
                continue
            for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
                kept = [value for value in part.optimizer.state[parameter].values() if value.shape == parameter.shape]
                kept += [parameter] if chosen.dtype_policy.mixed else []
                optimizer += sum(tensor.nbytes for tensor in kept)
    found = (
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.nbytes for parameter in parameters),
        # Without what fills buckets up, which is much in a model as small as this.
        sum(p.numel() * buffer.grad_data.element_size() for buffer in buffers for p in buffer.params),
        optimizer,
    )
    infra.destroy()
    return found


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_real_ranks(rank_pool: RankPool, name: str) -> None:
    chosen, layout = CASES[name]
    counted = expected(chosen, layout)
    found = rank_pool.run(real, chosen, layout, world_size=layout.ranks)
    distributed = bool(layout.ddp.get("use_distributed_optimizer"))
    stages_on = [[stage for stage in counted.stages if rank in stage.ranks] for rank in range(layout.ranks)]
    for rank, stages in enumerate(stages_on):
        parameters, weights, gradients, optimizer = found[rank]
        assert parameters == sum(stage.parameters for stage in stages), rank
        assert weights == sum(stage.weights for stage in stages), rank
        assert gradients == sum(stage.gradients for stage in stages), rank
        if not distributed:
            assert optimizer == sum(stage.optimizer for stage in stages), rank
    if distributed:
        # Which replica has how much depends on where megatron-core's buckets end; all of them together do not.
        for stage in counted.stages:
            total = sum(found[rank][3] for rank in stage.ranks)
            assert total == pytest.approx(stage.optimizer * len(stage.ranks), rel=0.01)
    alone = replace(layout, modules={name: ModuleParallelism(dp=1) for name in layout.modules}, colocate=True, ddp={})
    whole = expected(chosen, replace(alone, sequence_parallel=False))
    assert sum(counted.parameters.values()) == sum(whole.parameters.values())
    assert whole.stages[-1].parameters == whole.parameters["language"]
    if name == "one_rank":
        assert found[0][0] == sum(counted.parameters.values())

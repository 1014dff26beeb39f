"""Training with the nine public functions alone is training with the strategy, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.mimo.optimizer import MimoOptimizer, get_mimo_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch.utils.data import DataLoader

from lightning_mimo import (
    MimoModelInfra,
    MimoPrecision,
    ModuleParallelism,
    OptimizerOverride,
    build_pg_collection_for_schedule,
    finalize_model_grads_multimodule,
    get_module_to_grid_tuple,
    multimodule_no_sync,
    unwrap_mimo_model,
    validate_data_loader_contract,
    validate_no_stub_ranks,
    zero_grad_buffer_for_multimodule,
)
from lightning_mimo.comm.pipeline import MimoPipelineCommunicator
from lightning_mimo.data.loader import shard_dataloader
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.layers.vocab_parallel import token_losses
from lightning_mimo.layout.batch_plan import RankBatchPlan, validate_batch_sizes
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.mimo.model import RaggedMimoModel, build_mimo_model
from lightning_mimo.optim.ddp import options_by_module, wrap_with_ddp
from tests.parity.cases import OVERLAP, apart, task, together
from tests.parity.layouts import Layout, ddp_config, gradients, open_world, train, weights
from tests.parity.model import ParityModule, PicturesSoundsAndText, Samples, optimizer_config
from tests.parity.oracle import SEED, Task, Tensors
from tests.support.rank_pool import RankPool
from tests.support.tiers import exhaustive, with_default

STEPS = 3
# get_mimo_optimizer would let vectors decay, too, which this package's does not.
NO_DECAY = dict.fromkeys(("images", LANGUAGE), OptimizerOverride(weight_decay=0.0))
LAYOUTS = {
    "images_dp2-language_tp2": apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
    "images_dp1-language_dp2": apart(ModuleParallelism(), ModuleParallelism(dp=2)),
    "images_pp2-language_tp2pp2": apart(ModuleParallelism(pp=2), ModuleParallelism(tp=2, pp=2), num_microbatches=3),
    "images_dp4-language_dp2pp2": apart(ModuleParallelism(dp=4), ModuleParallelism(dp=2, pp=2), num_microbatches=3),
    "overlapped": apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2), ddp=OVERLAP),
    "colocated-one_rank": together(ModuleParallelism(), ModuleParallelism()),
    "colocated-images_dp2-language_tp2": together(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
    "colocated-images_tp2-language_dp2": together(ModuleParallelism(tp=2), ModuleParallelism(dp=2)),
}
IN_DEFAULT_RUN = (
    *("images_dp2-language_tp2", "images_pp2-language_tp2pp2", "overlapped"),
    "colocated-images_tp2-language_dp2",
)


class ByHand:
    """A training loop as a user of the reference page writes it, with Megatron's schedule and optimizer."""

    def __init__(self, task: Task, layout: Layout, infra: MimoModelInfra) -> None:
        self.infra = infra
        self.model = _model(task, layout, infra)
        self._check_set_up(task, layout)
        self._modules = get_module_to_grid_tuple(self.model, infra)
        config = unwrap_mimo_model(self.model).config
        config.no_sync_func = partial(multimodule_no_sync, module_to_grid_tuple=self._modules)
        config.finalize_model_grads_func = partial(
            finalize_model_grads_multimodule, infra=infra, module_to_grid_tuple=self._modules
        )
        self._communicator = None
        groups: Any = infra.pg_collections.get(LANGUAGE)
        run = get_forward_backward_func(pp_size=1, vp_size=None)
        if not infra.colocated:
            self._communicator = MimoPipelineCommunicator(
                infra, config, needs_gradient=lambda module, stage: True, encoder_run_ahead=1
            )
            groups = build_pg_collection_for_schedule(infra)
            run = get_forward_backward_func(schedule_pg_collection=groups)
        self._run = partial(
            run,
            forward_step_func=self._forward_step,
            model=self.model,
            seq_length=0,
            micro_batch_size=0,
            forward_only=False,
            pg_collection=groups,
            p2p_communicator=self._communicator,
        )
        self._optimizer = _optimizer(task, self.model)
        self.norms: list[float] = []

    def _check_set_up(self, task: Task, layout: Layout) -> None:
        validate_no_stub_ranks(self.infra.module_to_grid_map, dist.get_world_size())
        sizes = {name: cut.dp for name, cut in self.infra.layout.modules.items()}
        microbatches = layout.num_microbatches
        of_modules = validate_batch_sizes(sizes, global_batch_size=task.batch, num_microbatches=microbatches)
        validate_data_loader_contract(self.infra, task.batch, of_modules, microbatches)

    def backward(self, batch: list[Microbatch]) -> None:
        """Forward and backward of a global batch."""
        zero_grad_buffer_for_multimodule(self._modules)
        self._optimizer.zero_grad()
        if self._communicator is not None:
            self._communicator.begin(batch, forward_only=False)
        self._run(data_iterator=iter(batch), num_microbatches=len(batch))
        if self._communicator is not None:
            self._communicator.finish()

    def step(self) -> None:
        """Update the weights."""
        updated, norm, _ = self._optimizer.step()
        assert updated
        self.norms.append(norm)

    def _forward_step(self, iterator: Iterator[Microbatch], model: RaggedMimoModel) -> tuple[Any, Any]:
        microbatch = next(iterator)
        if self._communicator is not None:
            self._communicator.complete(microbatch)
        inputs = {name: each for name, each in microbatch["modality_inputs"].items() if model.role.is_first_stage(name)}
        output, _ = model(
            input_ids=microbatch["input_ids"],
            position_ids=microbatch["position_ids"],
            modality_inputs=inputs,
            modality_counts=microbatch["modality_counts"],
            token_order=microbatch.get("token_order"),
        )
        return output, partial(self._loss, microbatch)

    def _loss(self, microbatch: Microbatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        losses = token_losses(logits, microbatch["labels"], self.infra.pg_collections[LANGUAGE].tp)
        mask = microbatch["loss_mask"]
        loss = (losses * mask).sum()
        return loss, (mask > 0).sum().int(), loss.detach()


def _model(task: Task, layout: Layout, infra: MimoModelInfra) -> RaggedMimoModel:
    config = ParityModule(task.model).configure_mimo(infra)
    model = build_mimo_model(config, infra, seed=SEED, dtype_policy=task.dtype_policy)
    wrap_with_ddp(model, infra, options_by_module(ddp_config(layout), infra.layout.modules), task.dtype_policy)
    return model.train()


def _optimizer(task: Task, model: RaggedMimoModel) -> MimoOptimizer:
    config = replace(task.dtype_policy.optimizer_config(optimizer_config(task.model)), weight_decay=0.0)
    optimizer = get_mimo_optimizer(model, config)
    for group in optimizer.param_groups:
        group["fused"] = True  # torch's kernels round differently
    return optimizer


def _batches(task: Task, layout: Layout, infra: MimoModelInfra, model: RaggedMimoModel) -> Iterator[list[Microbatch]]:
    plan = RankBatchPlan.build(
        infra.layout, dist.get_rank(), global_batch_size=task.batch, num_microbatches=layout.num_microbatches
    )
    loader = DataLoader(PicturesSoundsAndText(task.samples), batch_size=task.batch)
    tokens, precision = model.special_token_ids, MimoPrecision(task.precision)
    sample_format = SampleFormat(special_token_ids=tokens, pad_token_id=0)
    for batch in shard_dataloader(loader, plan, sample_format=sample_format, seed=SEED):
        yield precision.convert_input(batch)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a rank found when it had trained both ways.

    Attributes:
        steps: how many were compared.
        different: names of what is not the same bit for bit.
        norm: largest relative difference of gradient norms.
        weight: largest difference of final weights, in units of the learning rate.
    """

    steps: int
    different: list[str]
    norm: float
    weight: float


def train_both_ways(task: Task, layout: Layout) -> Comparison:
    recorder, module, strategy = train(task, layout)
    final = weights(module.model, strategy.infra)
    strategy.infra.destroy()
    different = []
    with open_world(layout) as infra:
        hand = ByHand(task, layout, infra)
        for step, batch in zip(range(task.steps), _batches(task, layout, infra, hand.model), strict=False):
            hand.backward(batch)
            found = gradients(hand.model, infra)
            different += [f"gradient {name}, step {step}" for name in _unequal(found, recorder.gradients[step])]
            hand.step()
        found = weights(hand.model, infra)
        different += [f"weight {name}" for name in _unequal(found, final)]
        rate, limit = optimizer_config(task.model).lr, task.model.clip_grad
        assert all(norm > limit for norm in hand.norms), "nothing was clipped"
        return Comparison(
            steps=len(hand.norms),
            different=different,
            norm=max(abs(a / b - 1) for a, b in zip(hand.norms, recorder.norms, strict=True)),
            weight=max(float((found[name] - final[name]).abs().max()) for name in final) / rate,
        )


def _unequal(found: Tensors, expected: Tensors) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in found if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("precision", ["64-true", exhaustive("32-true")])
@pytest.mark.parametrize("name", with_default(LAYOUTS, IN_DEFAULT_RUN))
def test_gradients_and_steps_are_those_of_the_strategy(rank_pool: RankPool, name: str, precision: str) -> None:
    layout = LAYOUTS[name]
    # Megatron's MimoOptimizer takes its norm in float32, so only what is not clipped can be the same bit for bit.
    what = task(precision=precision, steps=STEPS, samples=Samples(number=12 * STEPS), clip_grad=0.0, overrides=NO_DECAY)
    for found in rank_pool.run(train_both_ways, what, layout, world_size=layout.ranks):
        assert found.steps == STEPS
        assert found.different == []
        assert found.norm < 1e-5


@pytest.mark.parametrize("name", ["images_dp2-language_tp2", exhaustive("colocated-images_dp2-language_tp2")])
def test_clipped_steps_differ_by_the_rounding_of_the_norm(rank_pool: RankPool, name: str) -> None:
    layout = LAYOUTS[name]
    what = task(precision="32-true", steps=1, samples=Samples(number=12), clip_grad=0.05, overrides=NO_DECAY)
    for found in rank_pool.run(train_both_ways, what, layout, world_size=layout.ranks):
        assert not [what for what in found.different if what.startswith("gradient")]
        assert found.norm < 1e-6
        assert found.weight < 1e-4  # float32 rounds the weights to 6e-6 of it

"""The optimizer of all modules with the face of a ``torch.optim.Optimizer``, which Lightning and torch want."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo.optimizer import ModuleOptimizerInfo
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from lightning_mimo.errors import ConfigError
from lightning_mimo.mimo.dtypes import DtypePolicy
from lightning_mimo.mimo.model import RaggedMimoModel, module_and_name
from lightning_mimo.observe.spans import SpanInfo, Spans
from lightning_mimo.optim.ddp import begin_gathering, complete_gathering
from lightning_mimo.optim.mimo_optimizer import SingleSyncMimoOptimizer, StepOutcome
from lightning_mimo.optim.param_groups import (
    OptimizerOverride,
    ParamGroupSpec,
    divide_into_groups,
    groups_for_schedulers,
    megatron_overrides,
    pass_on,
)
from lightning_mimo.optim.step_reduction import DeviceReduction
from lightning_mimo.parallel.infra import MimoModelInfra

_UPDATE = SpanInfo(kind="optimizer", label="update the weights")


class MimoTorchOptimizer(torch.optim.Optimizer):
    """Steps the optimizers of all modules at once, by the gradient norms over all of them.

    ``param_groups`` has one group for each module, and for each override inside of one, under its ``"name"``: the same
    groups on every rank and in every layout, so any learning-rate scheduler works on them, and its state fits any
    layout. Gradients are zeroed by the strategy, never by ``zero_grad``.

    Attributes:
        mimo: megatron-core's optimizers.
        reduction: what all ranks together came to; the closure of :meth:`step` sets it, and the step uses it up.
        outcome: what the last step found and did; ``None`` before the first and while gradients are accumulated.
        skipped_steps: how many steps have been skipped so far, because something was not finite.
    """

    def __init__(
        self,
        mimo: SingleSyncMimoOptimizer,
        model: RaggedMimoModel,
        param_groups: list[dict[str, Any]],
        *,
        spans: Spans,
    ) -> None:
        """
        Args:
            mimo: megatron-core's optimizers.
            model: what they update.
            param_groups: of :func:`lightning_mimo.optim.param_groups.groups_for_schedulers`.
            spans: where this rank records its updates.
        """
        super().__init__(
            param_groups, {key: value for key, value in param_groups[0].items() if key not in ("params", "name")}
        )
        self.mimo = mimo
        self.reduction: DeviceReduction | None = None
        self.outcome: StepOutcome | None = None
        self.skipped_steps = 0
        self._model = model
        self._spans = spans
        begin_gathering(model)

    @property
    def config(self) -> OptimizerConfig:
        return self.mimo.config

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: Lightning calls this after the schedule's backward passes, when gradients must be kept."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure (the global batch) and update the weights. Collective over the replicas of each module.

        Gradients may be changed between the two, but the norms that they are clipped by are those of the schedule.

        Returns:
            What the closure returned.
        """
        result = closure() if closure is not None else None
        reduction, self.reduction = self.reduction, None
        assert reduction is not None, "step() comes after the last batch of an accumulation"
        with self._spans.span(_UPDATE):
            pass_on(self.param_groups, self.mimo.param_groups, self.config)
            complete_gathering(self._model)
            self.outcome = self.mimo.step(reduction)
            # megatron-core has made param.grad an alias of DDP's gradient buffer. Left so, the next backward pass would
            # add to the buffer twice: once through param.grad and once through DDP's hook.
            self.mimo.zero_grad()
            begin_gathering(self._model)
        self.skipped_steps += not self.outcome.updated
        return result

    def state_dict(self) -> dict[str, Any]:
        """State of this rank's shards by module. Checkpoints hold other things: ``lightning_mimo.checkpoint.state``."""
        return self.mimo.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned on the same rank of the same layout."""
        self.mimo.load_state_dict(state_dict)

    def plain_state(self) -> dict[str, Any]:
        """All but the tensors of parameters, in plain types: the same on every rank and in every layout."""
        scaler = self.mimo.grad_scaler
        return {
            "param_groups": [
                {key: value for key, value in group.items() if key != "params"} for group in self.param_groups
            ],
            "grad_scaler": None if scaler is None else scaler.state_dict(),
            "skipped_steps": self.skipped_steps,
        }

    def load_plain_state(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`plain_state` returned. Groups are found by their names; new ones stay as they are."""
        saved = {group["name"]: group for group in state["param_groups"]}
        for group in self.param_groups:
            group.update(saved.get(group["name"], {}))
        if self.mimo.grad_scaler is not None and state["grad_scaler"]:
            self.mimo.grad_scaler.load_state_dict(state["grad_scaler"])
        self.skipped_steps = state["skipped_steps"]

    def __repr__(self) -> str:
        rates = ", ".join(f"{group['name']} lr={group['lr']:g}" for group in self.param_groups)
        return f"{type(self).__name__}({rates})"


def build_optimizer(
    model: RaggedMimoModel,
    infra: MimoModelInfra,
    config: OptimizerConfig,
    *,
    overrides: Mapping[str, OptimizerOverride],
    ddp: Mapping[str, DistributedDataParallelConfig],
    dtype_policy: DtypePolicy,
) -> MimoTorchOptimizer:
    """Optimizer of this rank's modules. Collective over the world.

    Args:
        model: the model, its modules wrapped in DDP. Its config learns how to scale the loss.
        infra: process groups.
        config: Megatron's optimizer settings; ``lr`` must be set. What precision and DDP decide is filled in.
        overrides: module, or submodule of one (``"images.input_projections"``) -> what is different there.
        ddp: module name -> how it was wrapped.
        dtype_policy: the dtypes of the run.

    Raises:
        ConfigError: if ``lr`` is not set, everything is frozen, or an override fits nothing.
    """
    if config.lr is None:
        raise ConfigError("OptimizerConfig(lr=...) is not set: Megatron has no default learning rate.")
    config = dtype_policy.optimizer_config(config)
    specs = divide_into_groups(model, infra, overrides)
    if not specs:
        raise ConfigError(
            "All parameters of the model are frozen: there is nothing to train. Take a name out of "
            "MimoModule(frozen=...), or leave requires_grad on for some parameter."
        )
    infos = {name: _info(name, model, infra, config, specs, ddp[name]) for name in infra.module_to_grid_map}
    mimo = SingleSyncMimoOptimizer(
        infos,
        config,
        group_names=[spec.name for spec in specs],
        clipping=_clipping(config, specs),
    )
    model.config.grad_scale_func = mimo.scale_loss
    for group in mimo.param_groups:
        # torch's Adam has a fused kernel for CPUs too, but takes it only when told to. Apex's and Transformer Engine's
        # optimizers, which megatron-core prefers where they are installed, have no such key.
        if "fused" in group:
            group["fused"] = True
    return MimoTorchOptimizer(mimo, model, groups_for_schedulers(config, specs), spans=infra.spans)


def _clipping(config: OptimizerConfig, specs: Sequence[ParamGroupSpec]) -> list[tuple[float, list[str]]]:
    """(largest norm, names of the groups that are clipped by their common norm)."""
    together: dict[str | None, list[ParamGroupSpec]] = {}
    for spec in specs:
        together.setdefault(spec.clipped_with, []).append(spec)
    return [
        (config.clip_grad if outer is None else members[0].override.clip_grad or 0.0, [spec.name for spec in members])
        for outer, members in together.items()
    ]


def _info(
    name: str,
    model: RaggedMimoModel,
    infra: MimoModelInfra,
    config: OptimizerConfig,
    specs: Sequence[ParamGroupSpec],
    ddp: DistributedDataParallelConfig,
) -> ModuleOptimizerInfo:
    """megatron-core's optimizer of one module, or what stands for it on other ranks."""
    grid = infra.module_to_grid_map[name]
    if name not in infra.participating_modules:
        return ModuleOptimizerInfo(optimizer=None, grid=grid, pg_collection=None, is_active=False)
    module, _ = module_and_name(model, name)
    own = copy.copy(config)
    # Two switches for one thing in megatron-core; how the module was wrapped decides.
    own.use_distributed_optimizer = ddp.use_distributed_optimizer
    own.overlap_param_gather = ddp.overlap_param_gather
    optimizer = get_megatron_optimizer(
        own,
        [module],
        config_overrides=megatron_overrides(own, specs),
        use_gloo_process_groups=False,
        pg_collection=infra.pg_collections[name],
    )
    return ModuleOptimizerInfo(optimizer=optimizer, grid=grid, pg_collection=infra.pg_collections[name], is_active=True)

"""The optimizer of all modules behind the ``torch.optim.Optimizer`` interface that Lightning and torch require."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """Steps the optimizers of all modules together, with gradient norms over all ranks.

    ``param_groups`` has one group for each module and for each override inside a module, identified by its ``"name"``.
    The groups are the same on every rank and in every layout, so any learning-rate scheduler can use them, and its
    state is valid in any layout. The strategy zeroes gradients; ``zero_grad`` does not.

    Attributes:
        mimo: megatron-core's optimizers.
        reduction: sums over all ranks; set by the closure of :meth:`step` and consumed by the step.
        outcome: result of the last step; ``None`` before the first step and while gradients are accumulated.
        skipped_steps: number of steps skipped so far because of NaN or infinite values.
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
            model: the model that they update.
            param_groups: from :func:`lightning_mimo.optim.param_groups.groups_for_schedulers`.
            spans: recorder for this rank's updates.
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

        Gradients may be modified after the closure, but they are clipped by the norms that the schedule computed.

        Returns:
            What the closure returned.

        Raises:
            ConfigError: if no batch has been run since the last step.
        """
        result = closure() if closure is not None else None
        reduction, self.reduction = self.reduction, None
        if reduction is None:
            raise ConfigError(
                "optimizer.step() finds no gradients: the closure, which runs the batch, was not called. Write "
                "optimizer.step(closure=optimizer_closure) in optimizer_step()."
            )
        with self._spans.span(_UPDATE):
            pass_on(self.param_groups, self.mimo.param_groups, self.config)
            complete_gathering(self._model)
            self.outcome = self.mimo.step(reduction)
            # megatron-core has made param.grad an alias of DDP's gradient buffer. If it stayed, the next backward pass
            # would add to the buffer twice: through param.grad and through DDP's hook.
            self.mimo.zero_grad()
            begin_gathering(self._model)
        self.skipped_steps += not self.outcome.updated
        return result

    def discard_gradients(self) -> None:
        """Forget what a closure has computed where no step follows. The buffers are zeroed before the next batch."""
        self.reduction = None
        self.mimo.zero_grad()  # as in step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank's shards by module.

        Checkpoints do not use it; they are written by ``lightning_mimo.checkpoint.state``.
        """
        return self.mimo.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from :meth:`state_dict` of the same rank in the same layout."""
        self.mimo.load_state_dict(state_dict)

    def plain_state(self) -> dict[str, Any]:
        """Return the state except the per-parameter tensors, in plain types; the same on every rank in every layout."""
        scaler = self.mimo.grad_scaler
        return {
            "param_groups": [
                {key: value for key, value in group.items() if key != "params"} for group in self.param_groups
            ],
            "grad_scaler": None if scaler is None else scaler.state_dict(),
            "skipped_steps": self.skipped_steps,
        }

    def problems_of_plain_state(self, state: Any) -> Iterator[str]:
        """Yield the reasons why a state cannot be loaded by :meth:`load_plain_state`."""
        if not isinstance(state, Mapping) or set(state) != {"param_groups", "grad_scaler", "skipped_steps"}:
            yield "the state of the optimizer must have param_groups, grad_scaler and skipped_steps"
            return
        if type(state["skipped_steps"]) is not int or state["skipped_steps"] < 0:
            yield f"skipped_steps is {state['skipped_steps']!r}, but must be a whole number of at least 0"
        groups = state["param_groups"]
        if not isinstance(groups, list) or not all(isinstance(group, Mapping) and "name" in group for group in groups):
            yield "param_groups must be a list of groups with names"
            return
        own = {group["name"]: group for group in self.param_groups}
        for group in groups:
            if group["name"] in own and (unknown := sorted(set(group) - set(own[group["name"]]))):
                yield (
                    f"the parameter group {group['name']!r} has {unknown[0]!r}, which the optimizer and scheduler of "
                    f"this run do not use"
                )
            for key, value in group.items():
                current = own.get(group["name"], {}).get(key)
                if isinstance(current, int | float) and not isinstance(value, int | float):
                    yield f"{key} of the parameter group {group['name']!r} is {value!r}, but must be a number"
        scaler = self.mimo.grad_scaler
        if scaler is not None and state["grad_scaler"]:
            expected = scaler.state_dict()
            if not isinstance(state["grad_scaler"], Mapping) or set(state["grad_scaler"]) != set(expected):
                yield f"grad_scaler must have {', '.join(expected)}"

    def load_plain_state(self, state: Mapping[str, Any]) -> None:
        """Load a state from :meth:`plain_state`. Groups are matched by name; groups not in the state do not change."""
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
    """Build the optimizer of this rank's modules. Collective over the world.

    Args:
        model: the model, with its modules wrapped in DDP. The loss scaling function is set in its config.
        infra: process groups.
        config: Megatron's optimizer settings; ``lr`` must be set. Settings that depend on precision and DDP are filled
            in.
        overrides: module or submodule (``"images.input_projections"``) -> settings that differ.
        ddp: module name -> DDP settings it was wrapped with.
        dtype_policy: the dtypes of the run.

    Raises:
        ConfigError: if ``lr`` is not set, all parameters are frozen, an override matches no module or submodule, or
            SGD is to be distributed.
    """
    if config.lr is None:
        raise ConfigError("OptimizerConfig(lr=...) is not set: Megatron has no default learning rate.")
    distributed = [name for name, options in ddp.items() if options.use_distributed_optimizer]
    if config.optimizer == "sgd" and distributed:
        raise ConfigError(
            f"OptimizerConfig(optimizer='sgd') does not work with use_distributed_optimizer=True (module "
            f"{distributed[0]!r}): megatron-core shards the state of Adam only. Use optimizer='adam', or omit "
            f"use_distributed_optimizer in MimoStrategy(ddp=...)."
        )
    for name in ("lr", "min_lr", "weight_decay", "clip_grad", "adam_eps"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"OptimizerConfig({name}={value}) must be a number of at least 0.")
    config = dtype_policy.optimizer_config(config)
    specs = divide_into_groups(model, infra, overrides)
    if not specs:
        raise ConfigError(
            "All parameters of the model are frozen: there is nothing to train. Remove a name from "
            "MimoModule(frozen=...), or keep requires_grad=True for some parameter."
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
        # torch's Adam also has a fused kernel for CPUs, but uses it only on request. The optimizers of Apex and
        # Transformer Engine, which megatron-core prefers if they are installed, have no such key.
        if "fused" in group:
            group["fused"] = True
    return MimoTorchOptimizer(mimo, model, groups_for_schedulers(config, specs), spans=infra.spans)


def _clipping(config: OptimizerConfig, specs: Sequence[ParamGroupSpec]) -> list[tuple[float, list[str]]]:
    """Return (maximum norm, names of the groups that are clipped by their common norm)."""
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
    """Build megatron-core's optimizer of one module, or an inactive entry on ranks without the module."""
    grid = infra.module_to_grid_map[name]
    if name not in infra.participating_modules:
        return ModuleOptimizerInfo(optimizer=None, grid=grid, pg_collection=None, is_active=False)
    module, _ = module_and_name(model, name)
    own = copy.copy(config)
    # megatron-core has these settings twice; those that the module was wrapped with apply.
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

"""Parameter groups: modules and overridden submodules, each with a learning rate, weight decay and clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from lightning_mimo.errors import ConfigError
from lightning_mimo.mimo.model import RaggedMimoModel
from lightning_mimo.mimo.parameter_names import (
    lies_under,
    module_of,
    named_parameters_of,
    on_any_rank,
    parameters_under,
)
from lightning_mimo.parallel.infra import MimoModelInfra


@dataclass(frozen=True, kw_only=True)
class OptimizerOverride:
    """Optimizer settings of one module or submodule that differ from the common OptimizerConfig.

    A field that is ``None`` is inherited from the override of the nearest enclosing submodule or module, or otherwise
    from the OptimizerConfig.

    Args:
        lr: learning rate.
        min_lr: learning rate at which the decay of Megatron's scheduler ends.
        weight_decay: weight decay, for matrices only, as in the OptimizerConfig.
        clip_grad: maximum norm of these gradients alone, which are then not part of the norm that clips all other
            gradients. 0 disables clipping.
    """

    lr: float | None = None
    min_lr: float | None = None
    weight_decay: float | None = None
    clip_grad: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"OptimizerOverride({field.name}={value}): must not be negative, infinite or NaN.")


@dataclass(frozen=True, kw_only=True)
class ParamGroupSpec:
    """One of the disjoint groups of all trained parameters, known on every rank.

    Attributes:
        name: name of a module, or of an override inside a module.
        override: settings that differ, including those of enclosing overrides.
        clipped_with: name of the override whose norm and limit clip the group; ``None`` if the group is clipped with
            all other parameters.
        parameters: parameters on this rank; empty if the group is on other ranks.
    """

    name: str
    override: OptimizerOverride
    clipped_with: str | None
    parameters: Sequence[torch.nn.Parameter]


def divide_into_groups(
    model: RaggedMimoModel, infra: MimoModelInfra, overrides: Mapping[str, OptimizerOverride]
) -> list[ParamGroupSpec]:
    """Divide the parameters into groups, one per module and per override inside it. Collective over the world.

    Groups without a trained parameter are omitted. The groups and their order are the same on every rank and in every
    layout: modules as in the layout, each followed by the overrides inside it. A parameter belongs to the group with
    the longest matching name.

    Raises:
        ConfigError: if an override matches no module or submodule.
    """
    inside = [name for name in overrides if name not in infra.layout.modules]
    found = parameters_under(model, infra, list(overrides), argument="overrides")
    names = [
        name
        for module in infra.layout.modules
        for name in (module, *(override for override in inside if module_of(override) == module))
    ]
    owner: dict[int, str] = {}
    parameters: dict[str, list[torch.nn.Parameter]] = {name: [] for name in names}
    for name in sorted(inside, key=len):
        owner.update({id(parameter): name for _, parameter in found[name]})
    for module in infra.participating_modules:
        for _, parameter in named_parameters_of(model, infra, module):
            if parameter.requires_grad:
                parameters[owner.get(id(parameter), module)].append(parameter)
    trained = on_any_rank([bool(parameters[name]) for name in names])
    return [
        _spec(name, overrides, parameters[name]) for name, is_trained in zip(names, trained, strict=True) if is_trained
    ]


def _spec(
    name: str, overrides: Mapping[str, OptimizerOverride], parameters: Sequence[torch.nn.Parameter]
) -> ParamGroupSpec:
    merged, clipped_with = OptimizerOverride(), None
    for outer in sorted((key for key in overrides if lies_under(name, key)), key=len):
        own = {field.name: getattr(overrides[outer], field.name) for field in fields(OptimizerOverride)}
        merged = replace(merged, **{key: value for key, value in own.items() if value is not None})
        clipped_with = clipped_with if overrides[outer].clip_grad is None else outer
    return ParamGroupSpec(name=name, override=merged, clipped_with=clipped_with, parameters=parameters)


def megatron_overrides(config: OptimizerConfig, specs: Sequence[ParamGroupSpec]) -> dict[ParamKey, ParamGroupOverride]:
    """Return Megatron's standard overrides and one more per group, so that no group of megatron-core spans two of ours.

    The ``"group_name"`` of each group in megatron-core's optimizers is then the name of the spec that it belongs to.
    """
    name_of = {id(parameter): spec.name for spec in specs for parameter in spec.parameters}
    overrides = dict(get_standard_config_overrides(config))
    for spec in specs:

        def is_in(parameter: torch.nn.Parameter, name: str, group_name: str = spec.name) -> bool:
            return name_of.get(id(parameter)) == group_name

        key = ParamKey(with_name_predicate=ParamWithNamePredicate(name=f"group {spec.name}", fn=is_in))
        overrides[key] = {"group_name": spec.name}
    return overrides


def groups_for_schedulers(config: OptimizerConfig, specs: Sequence[ParamGroupSpec]) -> list[dict[str, Any]]:
    """Return one parameter group per spec, the same on every rank and in every layout except for ``params``.

    Learning-rate schedulers update these groups, and :func:`pass_on` copies their values to megatron-core's groups.
    megatron-core has more groups: vectors have no weight decay, and experts are reduced over other ranks.
    """
    momentum = (
        {"momentum": config.sgd_momentum}
        if config.optimizer == "sgd"
        else {"betas": (config.adam_beta1, config.adam_beta2)}
    )
    return [
        {
            "params": list(spec.parameters),
            "name": spec.name,
            "lr": (lr := _either(spec.override.lr, config.lr)),
            "max_lr": lr,
            "min_lr": _either(spec.override.min_lr, config.min_lr, 0.0),
            "weight_decay": (decay := _either(spec.override.weight_decay, config.weight_decay)),
            "start_wd": decay,
            "end_wd": decay,
            **momentum,
        }
        for spec in specs
    ]


def pass_on(groups: Sequence[Mapping[str, Any]], inner: Sequence[dict[str, Any]], config: OptimizerConfig) -> None:
    """Copy learning rates, weight decay and momentum from the groups for schedulers to megatron-core's groups.

    Args:
        groups: the groups from :func:`groups_for_schedulers`.
        inner: the groups of megatron-core's optimizers on this rank.
        config: the config that those were built with. A group whose learning rate differs from it (Megatron's
            ``decoupled_lr``) keeps the ratio.
    """
    by_name = {group["name"]: group for group in groups}
    for group in inner:
        # A group without a name, or with the name of another module, is empty: megatron-core aligns groups over ranks.
        if (source := by_name.get(group.get("group_name"))) is not None:
            proportion = group["max_lr"] / config.lr if config.lr else 1.0
            group["lr"] = source["lr"] * proportion * group["lr_mult"]
            group["weight_decay"] = source["weight_decay"] * group["wd_mult"]
            group.update({key: source[key] for key in ("betas", "momentum") if key in source and key in group})


def _either(*values: float | None) -> float:
    return next(value for value in values if value is not None)

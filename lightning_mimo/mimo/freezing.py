"""Freezes parameters, and determines which pipeline stages therefore send gradients back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.mimo.model import RaggedMimoModel, module_and_name
from lightning_mimo.mimo.parameter_names import on_any_rank, parameters_under
from lightning_mimo.parallel.infra import MimoModelInfra


def freeze(model: RaggedMimoModel, infra: MimoModelInfra, names: Sequence[str]) -> None:
    """Freeze the parameters of modules or submodules. Collective over the world.

    Args:
        model: the model, its modules not wrapped yet.
        infra: layout and process groups of this rank.
        names: modules such as ``"images"``, or submodules such as ``"images.encoders"``; see
            :func:`lightning_mimo.mimo.parameter_names.parameters_under`.

    Raises:
        ConfigError: if a name is not in the layout, or matches no parameter on any rank.
    """
    for parameters in parameters_under(model, infra, names, argument="frozen").values():
        for _, parameter in parameters:
            parameter.requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class GradientFlow:
    """Which pipeline stages have trained parameters, the same on every rank.

    Attributes:
        trained: module name -> for each of its pipeline stages, whether it has a trained parameter.
    """

    trained: Mapping[str, tuple[bool, ...]]

    @classmethod
    def build(cls, model: RaggedMimoModel, infra: MimoModelInfra) -> GradientFlow:
        """Collect the flags from the parameters of all ranks. Collective over the world."""
        modules = infra.layout.modules
        stages = [(name, stage) for name, sizes in modules.items() for stage in range(sizes.pp)]
        flags = [False] * len(stages)
        for name in infra.participating_modules:
            module, _ = module_and_name(model, name)
            place = stages.index((name, modules[name].coordinates(dist.get_rank())["pp"]))
            flags[place] = any(parameter.requires_grad for parameter in module.parameters())
        by_stage = dict(zip(stages, on_any_rank(flags), strict=True))
        return cls(trained={name: tuple(by_stage[name, s] for s in range(modules[name].pp)) for name in modules})

    def leaves(self, module: str, stage: int) -> bool:
        """Whether the output of a stage needs a gradient, because it depends on a trained parameter."""
        feeding = [name for name in self.trained if name != LANGUAGE] if module == LANGUAGE else []
        return any(self.trained[module][: stage + 1]) or any(any(self.trained[name]) for name in feeding)

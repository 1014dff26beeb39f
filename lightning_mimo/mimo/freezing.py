"""Freezes parameters, and determines which pipeline stages therefore send gradients back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.mimo.model import RaggedMimoModel, module_and_name
from lightning_mimo.mimo.parameter_names import named_parameters_of, on_any_rank, parameters_under
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


class TrainedParameters:
    """Which parameters of this rank were trained when DDP was set up. Reductions and the optimizer keep to that."""

    def __init__(self, model: RaggedMimoModel, infra: MimoModelInfra) -> None:
        """
        Args:
            model: the model, wrapped or not.
            infra: process groups of this rank.
        """
        modules = infra.participating_modules
        named = [each for module in modules for each in named_parameters_of(model, infra, module)]
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._trained = [parameter.requires_grad for parameter in self._parameters]

    def check(self) -> None:
        """Check that no parameter has been frozen or unfrozen since. Not collective.

        Raises:
            ConfigError: naming the first parameter that has.
        """
        now = [parameter.requires_grad for parameter in self._parameters]
        if now == self._trained:
            return
        name = next(name for name, one, other in zip(self._names, self._trained, now, strict=True) if one != other)
        what = "frozen" if self._trained[self._names.index(name)] else "unfrozen"
        raise ConfigError(
            f"{name!r} was {what} after the gradient buffers and the optimizer had been set up, so "
            f"{'it would still be updated' if what == 'frozen' else 'it would not be updated'}. Set requires_grad in "
            f"configure_model(), or MimoModule(frozen=[...]); to change it later, begin a run with another value from "
            f"the weights of a checkpoint (init_from)."
        )


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

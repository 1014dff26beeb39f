"""What is trained and what is frozen, and across which borders gradients therefore have to travel back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lightning_mimo.infra import MimoModelInfra
from lightning_mimo.initialization import global_named_parameters
from lightning_mimo.model import SampleAlignedMimoModel, module_and_name
from lightning_mimo.parallelism import LANGUAGE


def freeze(model: SampleAlignedMimoModel, infra: MimoModelInfra, names: Sequence[str]) -> None:
    """Stop the parameters of modules, or of parts of them, from being trained. Collective over the world.

    Args:
        model: the model, its modules not wrapped yet.
        infra: which modules this rank holds.
        names: ``"images"`` for a whole module, ``"images.encoders"`` or ``"language.decoder.layers.0"`` for what lies
            under that path in it, layers counted over all pipeline stages. An encoder's projector is
            ``"images.input_projections"``.

    Raises:
        ValueError: naming what is no module of the layout, or fits no parameter on any rank.
    """
    found = torch.zeros(len(names), dtype=torch.int64)
    for i, name in enumerate(names):
        module_name, _, path = name.partition(".")
        if module_name not in infra.layout.modules:
            raise ValueError(
                f"frozen={name!r}: there is no module {module_name!r}; the layout has "
                f"{', '.join(map(repr, infra.layout.modules))}."
            )
        if module_name in infra.participating_modules:
            module, prefix = module_and_name(model, module_name)
            under = f"{prefix}.{path}." if path else f"{prefix}."
            groups = infra.pg_collections[module_name]
            for parameter_name, parameter in global_named_parameters(module, prefix=prefix, groups=groups):
                if parameter_name.startswith(under):
                    parameter.requires_grad_(False)
                    found[i] += 1
    found = found.to(torch.cuda.current_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    missing = [name for name, count in zip(names, found.tolist(), strict=True) if not count]
    if missing:
        raise ValueError(
            f"frozen={missing}: no parameter lies under these names. Write a module's name, or module.path as in "
            f"named_parameters() of that module."
        )


@dataclass(frozen=True, kw_only=True)
class GradientFlow:
    """Which pipeline stages have something to train, known on every rank.

    Attributes:
        trained: module name -> for each of its pipeline stages, whether a parameter there is trained.
    """

    trained: Mapping[str, tuple[bool, ...]]

    @classmethod
    def build(cls, model: SampleAlignedMimoModel, infra: MimoModelInfra) -> GradientFlow:
        """Look at the parameters of all ranks. Collective over the world."""
        modules = infra.layout.modules
        stages = [(name, stage) for name, sizes in modules.items() for stage in range(sizes.pp)]
        flags = torch.zeros(len(stages), dtype=torch.int32)
        for name in infra.participating_modules:
            module, _ = module_and_name(model, name)
            place = stages.index((name, modules[name].coordinates(dist.get_rank())["pp"]))
            flags[place] = any(parameter.requires_grad for parameter in module.parameters())
        flags = flags.to(torch.cuda.current_device())
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        by_stage = dict(zip(stages, map(bool, flags.tolist()), strict=True))
        return cls(trained={name: tuple(by_stage[name, s] for s in range(modules[name].pp)) for name in modules})

    @property
    def anything(self) -> bool:
        """Whether the model has anything to train."""
        return any(any(stages) for stages in self.trained.values())

    def leaves(self, module: str, stage: int) -> bool:
        """Whether the output of a stage needs a gradient: something that it was computed with is trained."""
        feeding = [name for name in self.trained if name != LANGUAGE] if module == LANGUAGE else []
        return any(self.trained[module][: stage + 1]) or any(any(self.trained[name]) for name in feeding)

"""Layout-independent names of modules, submodules and parameters, and the parameters under a name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from lightning_mimo.errors import ConfigError
from lightning_mimo.mimo.initialization import global_named_buffers, global_named_parameters
from lightning_mimo.mimo.model import RaggedMimoModel, module_and_name
from lightning_mimo.parallel.infra import MimoModelInfra


def named_parameters_of(
    model: RaggedMimoModel, infra: MimoModelInfra, module: str
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of one of this rank's modules, with names that are the same in every layout and if wrapped.

    Names begin with the module's name in the layout: ``language.decoder.layers.0.…``.
    """
    parameters, _ = module_and_name(model, module)
    yield from global_named_parameters(unwrap_model(parameters), prefix=module, groups=infra.pg_collections[module])


def named_buffers_of(model: RaggedMimoModel, infra: MimoModelInfra, module: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Persistent buffers of one of this rank's modules, with names as of :func:`named_parameters_of`."""
    buffers, _ = module_and_name(model, module)
    yield from global_named_buffers(unwrap_model(buffers), prefix=module, groups=infra.pg_collections[module])


def parameters_under(
    model: RaggedMimoModel, infra: MimoModelInfra, names: Sequence[str], *, argument: str
) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
    """Find this rank's parameters under each of the given names. Collective over the world.

    Args:
        model: the model, wrapped or not.
        infra: layout and process groups of this rank.
        names: ``"images"`` for a whole module, ``"images.encoders"`` or ``"language.decoder.layers.0"`` for a submodule
            of it, with layers counted over all pipeline stages. An encoder's projector is
            ``"images.input_projections"``.
        argument: the argument that contains the names, for the message.

    Returns:
        Name -> list of (global name, parameter), empty if all of them are on other ranks.

    Raises:
        ConfigError: if a name is not in the layout, or matches no parameter on any rank.
    """
    found: dict[str, list[tuple[str, torch.nn.Parameter]]] = {}
    for name in names:
        module = module_of(name)
        if module not in infra.layout.modules:
            raise ConfigError(
                f"{argument}={name!r}: there is no module {module!r}; the layout has "
                f"{', '.join(map(repr, infra.layout.modules))}."
            )
        held = named_parameters_of(model, infra, module) if module in infra.participating_modules else ()
        found[name] = [(path, parameter) for path, parameter in held if lies_under(path, name)]
    present = on_any_rank([bool(parameters) for parameters in found.values()])
    if missing := [name for name, is_present in zip(found, present, strict=True) if not is_present]:
        raise ConfigError(
            f"{argument}={missing}: no parameter lies under these names. Write a module's name, or module.path as in "
            f"named_parameters() of that module."
        )
    return found


def module_of(name: str) -> str:
    """Module of a name: ``"images.encoders"`` -> ``"images"``."""
    return name.partition(".")[0]


def part_of(name: str) -> str:
    """Part of a module that a parameter belongs to: ``"images.encoders.vit.bias"`` -> ``"images.encoders"``."""
    return ".".join(name.split(".")[:2])


def lies_under(path: str, name: str) -> bool:
    """Whether a path equals a name or is under it: ``"images.encoders.vit"`` is under ``"images.encoders"``."""
    return f"{path}.".startswith(f"{name}.")


def on_any_rank(flags: Sequence[bool]) -> list[bool]:
    """For each flag, whether it is set on any rank. Collective over the world, with equally many flags per rank."""
    found = torch.tensor(flags, dtype=torch.int32).to(torch.cuda.current_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]

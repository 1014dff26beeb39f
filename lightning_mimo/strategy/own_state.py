"""Parameters and buffers of a MimoModule itself, beside those of its model. Every rank has a copy of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from lightning_mimo.errors import CheckpointError, ConfigError
from lightning_mimo.mimo.buffers import persistent_buffers
from lightning_mimo.mimo.replica_check import checksum

_MODEL = "model"  # attribute of MimoModule that holds the MimoModel


def check_own_parameters(module: pl.LightningModule) -> None:
    """Refuse trained parameters of the module itself.

    Raises:
        ConfigError: naming the first of them.
    """
    trained = [name for name, parameter in _own_parameters(module) if parameter.requires_grad]
    if trained:
        raise ConfigError(
            f"{type(module).__name__}.{trained[0]} is a Parameter of the module itself, which would neither be trained "
            f"nor saved: every rank has a copy, and only some of them use it, each on a part of the logits. Put it "
            f"into a module of the model, such as an encoder's class; or, if it is constant, write "
            f"register_buffer({trained[0].rpartition('.')[2]!r}, ...) or requires_grad_(False)."
        )


def own_state(module: pl.LightningModule) -> dict[str, torch.Tensor]:
    """Constant parameters and persistent buffers of a module that are not the model's: name -> tensor."""
    buffers = {name: buffer for name, buffer in persistent_buffers(module) if not _is_models(name)}
    return {**dict(_own_parameters(module)), **buffers}


def own_state_to_save(module: pl.LightningModule) -> dict[str, torch.Tensor]:
    """Copy :func:`own_state` to the CPU. Collective over the world, if it has something.

    Raises:
        ConfigError: on every rank, naming the first tensor that differs between ranks.
    """
    check_same_on_all_ranks(module)
    return {name: tensor.detach().cpu().clone() for name, tensor in own_state(module).items()}


def set_up_own_state(module: pl.LightningModule, device: torch.device) -> None:
    """Move what a module has beside the model, buffers that are not saved included, to this rank's device.

    Raises:
        ConfigError: naming the first trained parameter of the module itself.
    """
    check_own_parameters(module)
    for name, child in module.named_children():
        if name != _MODEL:
            child.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))
    for _, parameter in module.named_parameters(recurse=False):
        parameter.data = parameter.data.to(device)


def _own_parameters(module: pl.LightningModule) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if not _is_models(name)]


def _is_models(name: str) -> bool:
    return name.partition(".")[0] == _MODEL


def load_own_state(module: pl.LightningModule, saved: Mapping[str, Any]) -> None:
    """Restore what :func:`own_state` gave.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    state = own_state(module)
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    found = {name: list(tensor.shape) for name, tensor in saved.items()}
    if shapes != found:
        raise CheckpointError(
            f"{type(module).__name__} has the buffers and constant parameters {shapes} beside its model, but the "
            f"checkpoint has {found}. Use a checkpoint of the same class."
        )
    for name, tensor in saved.items():
        state[name].data.copy_(tensor)


def check_same_on_all_ranks(module: pl.LightningModule) -> None:
    """Compare what a module has beside its model over all ranks. Collective over the world, if it has something.

    Raises:
        ConfigError: on every rank, naming the first tensor that differs.
    """
    sums = {name: int(checksum(tensor.reshape(-1))) for name, tensor in own_state(module).items()}
    if not sums:
        return
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, sums)
    for name in sums:
        if len({held.get(name) for held in ranks}) > 1:
            raise ConfigError(
                f"{type(module).__name__}.{name} differs between ranks. A buffer of the module itself must be the same "
                f"everywhere, but steps and loss() see other data on every rank, and loss() runs on "
                f"some of them only. Return what is to be averaged from loss() as a metric, or make it a buffer with "
                f"persistent=False."
            )

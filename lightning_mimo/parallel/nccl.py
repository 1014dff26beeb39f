"""Options of NCCL for the process groups of each use."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch.distributed as dist

from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.communicators import Use


@dataclass(frozen=True, kw_only=True)
class NcclGroupOptions:
    """Options of NCCL for some process groups. ``None`` leaves NCCL's own choice.

    Args:
        high_priority_stream: run their kernels before those of other streams that are ready at the same time.
        min_ctas: smallest number of thread blocks of a kernel.
        max_ctas: largest number of thread blocks of a kernel. A small number leaves more of the GPU to computation.
        cga_cluster_size: thread blocks of a cluster, 0 to 8, on Hopper and later.
        net_name: network between nodes, ``IB`` or ``Socket``.

    Raises:
        ConfigError: for a value that NCCL would refuse.
    """

    high_priority_stream: bool = False
    min_ctas: int | None = None
    max_ctas: int | None = None
    cga_cluster_size: int | None = None
    net_name: Literal["IB", "Socket"] | None = None

    def __post_init__(self) -> None:
        for name, least, most in (("min_ctas", 1, 64), ("max_ctas", 1, 64), ("cga_cluster_size", 0, 8)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not least <= value <= most):
                raise ConfigError(
                    f"NcclGroupOptions({name}={value!r}) must be a whole number from {least} to {most}, or None."
                )
        if self.min_ctas is not None and self.max_ctas is not None and self.min_ctas > self.max_ctas:
            raise ConfigError(
                f"NcclGroupOptions(min_ctas={self.min_ctas}, max_ctas={self.max_ctas}): min_ctas must not be larger."
            )
        if self.net_name not in (None, "IB", "Socket"):
            raise ConfigError(f"NcclGroupOptions(net_name={self.net_name!r}): choose 'IB', 'Socket' or None.")

    def to_torch(self) -> dist.ProcessGroupNCCL.Options:
        """New options of torch for one group; torch writes the group's name and ranks into them."""
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=self.high_priority_stream)
        for name in ("min_ctas", "max_ctas", "cga_cluster_size", "net_name"):
            if (value := getattr(self, name)) is not None:
                setattr(options.config, name, value)
        return options


@dataclass(frozen=True, kw_only=True)
class NcclOptions:
    """Options of NCCL, by what process groups are used for.

    The default group of all ranks and the groups that megatron-core makes for bridges between modules on shared ranks
    are not changed.

    Args:
        model: groups of tensor, expert and pipeline parallelism.
        gradients: groups that reduce gradients of dense parameters, and gather those parameters.
        expert_gradients: the same for experts with ep above 1.
        transfers: transfers between modules on ranks of their own, and between pipeline stages.
    """

    model: NcclGroupOptions = NcclGroupOptions()
    gradients: NcclGroupOptions = NcclGroupOptions()
    expert_gradients: NcclGroupOptions = NcclGroupOptions()
    transfers: NcclGroupOptions = NcclGroupOptions()

    def for_use(self, use: Use) -> dist.ProcessGroupNCCL.Options | None:
        """New options of torch for a group of this use; ``None`` if nothing was chosen for it."""
        field = use.replace(" ", "_")
        chosen = getattr(self, field) if field in {each.name for each in fields(self)} else self.transfers
        return None if chosen == NcclGroupOptions() else chosen.to_torch()

    def check_backend(self, backend: str) -> None:
        """Check that the options have an effect.

        Raises:
            ConfigError: if any is set and the backend of the process groups is not NCCL.
        """
        if self != NcclOptions() and backend != "nccl":
            raise ConfigError(
                f"MimoStrategy(nccl=...) sets options of NCCL, but the process groups of this run use {backend}. Leave "
                f"nccl out, or train on GPUs with process_group_backend='nccl'."
            )

"""The ranks of a run as Lightning sees them, and the collectives over all of them: what MimoStrategy stands on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, override

import torch
import torch.distributed as dist
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed import ReduceOp

from lightning_mimo.observe.spans import SpanInfo, Spans

_REDUCE = SpanInfo(kind="world", label="reduce a number over ranks, between steps")
_BARRIER = SpanInfo(kind="world", label="pass a barrier of all ranks, between steps")
_BROADCAST = SpanInfo(kind="world", label="receive what another rank tells all, between steps")


class WorldStrategy(ParallelStrategy):
    """One process for each device of each node, and reductions over them; nothing about models.

    Attributes:
        spans: what this rank does is recorded here; set by the subclass.
    """

    num_nodes = 1  # set by the Trainer
    is_distributed = True  # or log(sync_dist=True) would do nothing
    spans: Spans

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Ranks on this node."""
        return len(self.parallel_devices or [])

    @contextlib.contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Build on the CPU, on every accelerator alike: a GPU's generator would draw other initial weights."""
        with super().tensor_init_context(empty_init=empty_init), torch.device("cpu"):
            yield

    def _set_world_ranks(self) -> None:
        assert self.cluster_environment is not None
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank

    @override
    def reduce(
        self, tensor: torch.Tensor | Any, group: Any = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> torch.Tensor | Any:
        """Reduce a tensor over the world (or a group). Other objects come back as is.

        Args:
            tensor: changed in place, but for the mean's division.
            group: in the place of the world.
            reduce_op: "mean", the name of a ReduceOp in any case, or a ReduceOp; ``None`` is the sum.
        """
        if not isinstance(tensor, torch.Tensor) or not dist.is_initialized():
            return tensor
        if isinstance(reduce_op, str):
            reduce_op = getattr(ReduceOp, {"MEAN": "AVG"}.get(reduce_op.upper(), reduce_op.upper()))
        mean = reduce_op == ReduceOp.AVG  # not every backend has it
        op = ReduceOp.SUM if mean or reduce_op is None else reduce_op
        with self.spans.span(_REDUCE):
            dist.all_reduce(tensor, op=op, group=group)
        if mean:
            tensor = tensor / dist.get_world_size(group)
        return tensor

    @override
    def barrier(self, name: str | None = None) -> None:
        if dist.is_initialized():
            with self.spans.span(_BARRIER):
                # NCCL reduces a number for it; which GPU is to do so it would have to guess, and warns.
                device = self.root_device
                dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        if not dist.is_initialized():
            return obj
        box = [obj]
        with self.spans.span(_BROADCAST):
            dist.broadcast_object_list(box, src)
        return box[0]

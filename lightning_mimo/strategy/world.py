"""All ranks together: how they find one another, what Lightning has them tell one another, and who watches them."""

from __future__ import annotations

import signal
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from torch.distributed import ReduceOp

from lightning_mimo.launch.fork_launcher import ForkLauncher
from lightning_mimo.layout.batch_plan import RankBatchPlan, micro_batch_sizes
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo_parallel_utils import validate_data_loader_contract, validate_no_stub_ranks
from lightning_mimo.observe.spans import SpanInfo, Spans
from lightning_mimo.observe.watchdog import Watchdog
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.upstream.lightning import _get_default_process_group_backend_for_device, _init_dist_connection

_REDUCE = SpanInfo(kind="world", label="reduce a number over ranks, between steps")
_BARRIER = SpanInfo(kind="world", label="pass a barrier of all ranks, between steps")
_BROADCAST = SpanInfo(kind="world", label="receive what another rank tells all, between steps")


class WorldCollectives:
    """Each does nothing where there is no process group."""

    def __init__(self, spans: Spans) -> None:
        """
        Args:
            spans: where this rank notes what it waits for.
        """
        self._spans = spans

    def reduce(self, tensor: Any, group: dist.ProcessGroup | None, reduce_op: ReduceOp | str | None) -> Any:
        """Reduce a tensor over the world (or a group). Other objects come back as they are.

        Args:
            tensor: changed in place, but for the division of a mean.
            group: in the place of the world.
            reduce_op: "mean", the name of a ReduceOp in any case, or a ReduceOp; ``None`` is the sum.
        """
        if not isinstance(tensor, torch.Tensor) or not dist.is_initialized():
            return tensor
        if isinstance(reduce_op, str):
            reduce_op = getattr(ReduceOp, {"MEAN": "AVG"}.get(reduce_op.upper(), reduce_op.upper()))
        mean = reduce_op == ReduceOp.AVG  # not every backend has it
        op = ReduceOp.SUM if mean or reduce_op is None else reduce_op
        with self._spans.span(_REDUCE):
            dist.all_reduce(tensor, op=op, group=group)
        return tensor / dist.get_world_size(group) if mean else tensor

    def barrier(self, device: torch.device) -> None:
        """Wait until all ranks are here.

        Args:
            device: of this rank. NCCL reduces a number for a barrier, and would have to guess on which GPU.
        """
        if dist.is_initialized():
            with self._spans.span(_BARRIER):
                dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)

    def broadcast[T](self, obj: T, src: int) -> T:
        """A picklable object of one rank, on all of them."""
        if not dist.is_initialized():
            return obj
        box = [obj]
        with self._spans.span(_BROADCAST):
            dist.broadcast_object_list(box, src)
        return box[0]


def join_world(environment: ClusterEnvironment, device: torch.device, backend: str | None, timeout: timedelta) -> None:
    """Make torch.distributed's default process group, unless there is one. Collective over the world.

    Args:
        environment: tells where rank 0 is.
        device: of this rank.
        backend: ``None`` is the one that fits the device.
        timeout: how long a rank may wait for another; the watchdog of :func:`start_watchdog` comes first.
    """
    backend = backend or _get_default_process_group_backend_for_device(device)
    _init_dist_connection(environment, backend, timeout=Watchdog.patience_after(timeout))


def build_infra(
    layout: MimoLayout, spans: Spans, *, global_batch_size: int, num_microbatches: int
) -> tuple[MimoModelInfra, RankBatchPlan]:
    """Process groups of a layout, checked against what the data are to be. Collective over the world.

    Args:
        layout: of all ranks.
        spans: where this rank notes what it does.
        global_batch_size: samples of a batch over all ranks.
        num_microbatches: that it is cut into.

    Returns:
        Grids and process groups, and this rank's share of every global batch.
    """
    infra = MimoModelInfra.build(layout, spans=spans)
    sizes = micro_batch_sizes(layout, global_batch_size=global_batch_size, num_microbatches=num_microbatches)
    validate_no_stub_ranks(infra.module_to_grid_map, layout.world_size)
    validate_data_loader_contract(infra, global_batch_size, sizes, num_microbatches)
    plan = RankBatchPlan.build(
        layout, dist.get_rank(), global_batch_size=global_batch_size, num_microbatches=num_microbatches
    )
    return infra, plan


def start_watchdog(
    infra: MimoModelInfra, launcher: Any, device: torch.device, local_rank: int, timeout: timedelta
) -> Watchdog:
    """Watch over the waiting of this rank. To be called when all of its process groups exist.

    Args:
        infra: layout, process groups, and where this rank notes what it does.
        launcher: of this rank's node; ends the others on it.
        device: of this rank.
        local_rank: on its node. The first one started the others, which are to be gone before it reports their end.
        timeout: how long a rank may wait for another.
    """
    infra.set_timeout(Watchdog.patience_after(timeout))
    kill = launcher.kill_node if isinstance(launcher, ForkLauncher) else partial(launcher.kill, signal.SIGKILL)
    watchdog = Watchdog(
        infra.spans,
        infra.layout,
        timeout=timeout,
        end_node=kill,
        leaves_first=local_rank == 0,
        on_gpu=device.type == "cuda",
    )
    watchdog.start()
    return watchdog

"""Functions over all ranks: default process group, Lightning's collectives, infrastructure and watchdog."""

from __future__ import annotations

import signal
import socket
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed import ReduceOp

from lightning_mimo.errors import ConfigError
from lightning_mimo.launch.fork_launcher import ForkLauncher
from lightning_mimo.layout.batch_plan import RankBatchPlan, micro_batch_sizes
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.communicators import communicators_of
from lightning_mimo.mimo.model import RaggedMimoModel
from lightning_mimo.mimo_parallel_utils import validate_data_loader_contract, validate_no_stub_ranks
from lightning_mimo.observe.spans import SpanInfo, Spans
from lightning_mimo.observe.watchdog import Watchdog
from lightning_mimo.parallel.communicators import make_communicators
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.parallel.nccl import NcclOptions
from lightning_mimo.upstream.lightning import _get_default_process_group_backend_for_device, _init_dist_connection

_REDUCE = SpanInfo(kind="world", label="reduce a number over ranks, between steps")
_BARRIER = SpanInfo(kind="world", label="pass a barrier of all ranks, between steps")
_LOOPBACK = ("127.0.0.1", "localhost")
_BROADCAST = SpanInfo(kind="world", label="receive what another rank tells all, between steps")
_HEAD_START = timedelta(seconds=10)


class WorldCollectives:
    """Lightning's collectives over all ranks. Each has no effect if there is no process group."""

    def __init__(self, spans: Spans) -> None:
        """
        Args:
            spans: records what this rank waits for.
        """
        self._spans = spans

    def reduce(self, tensor: Any, group: dist.ProcessGroup | None, reduce_op: ReduceOp | str | None) -> Any:
        """Reduce a tensor over the world or a group. Other objects are returned unchanged.

        Args:
            tensor: reduced in place, except for the division of a mean.
            group: a process group; ``None`` for the world.
            reduce_op: "mean", the name of a ReduceOp (not case-sensitive), or a ReduceOp; ``None`` for the sum.
        """
        if not isinstance(tensor, torch.Tensor) or not dist.is_initialized():
            return tensor
        if isinstance(reduce_op, str):
            reduce_op = getattr(ReduceOp, {"MEAN": "AVG"}.get(reduce_op.upper(), reduce_op.upper()))
        mean = reduce_op == ReduceOp.AVG  # not supported by every backend
        op: Any = ReduceOp.SUM if mean or reduce_op is None else reduce_op
        with self._spans.span(_REDUCE):
            dist.all_reduce(tensor, op=op, group=group)
        return tensor / dist.get_world_size(group) if mean else tensor

    def barrier(self, device: torch.device, *, timeout: timedelta | None) -> None:
        """Wait until all ranks have called this.

        Args:
            device: device of this rank. NCCL implements a barrier as an all-reduce, and would have to guess the GPU.
            timeout: longest time that a rank may wait for another, where no watchdog names the rank that does not come
                yet; gloo names it then. ``None`` where a watchdog does.
        """
        if not dist.is_initialized():
            return
        with self._spans.span(_BARRIER):
            if timeout is None or dist.get_backend() != "gloo":
                dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
            else:
                # Only rank 0 knows who is missing, so it must not be the last to give up.
                patience = Watchdog.patience_after(timeout)
                dist.monitored_barrier(timeout=patience - _HEAD_START * (dist.get_rank() == 0), wait_all_ranks=True)

    def broadcast[T](self, obj: T, src: int) -> T:
        """Return the picklable object of rank ``src`` on all ranks."""
        if not dist.is_initialized():
            return obj
        box = [obj]
        with self._spans.span(_BROADCAST):
            dist.broadcast_object_list(box, src)
        return box[0]


def tell_rank(environment: ClusterEnvironment, *, rank: int, world_size: int) -> None:
    """Tell Lightning and its ClusterEnvironment the rank of this process, and repeat the seeding of the run.

    Args:
        environment: the cluster.
        rank: rank of this process.
        world_size: number of ranks.
    """
    environment.set_global_rank(rank)
    environment.set_world_size(world_size)
    rank_zero_only.rank = environment.global_rank()  # type: ignore[attr-defined]  # an attribute of the function
    reset_seed()


def backend_for(device: torch.device, chosen: str | None) -> str:
    """The torch.distributed backend of a run on a device.

    Args:
        device: device of a rank.
        chosen: the user's choice, if any.
    """
    return chosen or _get_default_process_group_backend_for_device(device)


def join_world(environment: ClusterEnvironment, device: torch.device, backend: str | None, timeout: timedelta) -> None:
    """Create torch.distributed's default process group unless it exists. Collective over the world.

    Args:
        environment: provides the address of rank 0.
        device: device of this rank.
        backend: torch.distributed backend; ``None`` selects the default for the device.
        timeout: longest time that a rank may wait for another. The process group waits longer than this, so that the
            watchdog of :func:`start_watchdog` reports first.
    """
    backend = backend_for(device, backend)
    patience = Watchdog.patience_after(timeout)
    options: dict[str, Any] = {}
    # torchrun's agent holds a store of its own at the same port.
    has_store = dist.is_initialized() or isinstance(environment, TorchElasticEnvironment)
    if not has_store and environment.main_address in _LOOPBACK:
        options["store"] = loopback_store(environment, patience)
    _init_dist_connection(environment, backend, timeout=patience, **options)


def loopback_store(environment: ClusterEnvironment, timeout: timedelta) -> dist.TCPStore:
    """The store at which ranks of one machine meet. torch's own listens on all network interfaces."""
    port, ranks, is_first = environment.main_port, environment.world_size(), environment.global_rank() == 0
    if not is_first:
        return dist.TCPStore(_LOOPBACK[0], port, ranks, False, timeout)
    listening = socket.create_server((_LOOPBACK[0], port), backlog=ranks).detach()
    return dist.TCPStore(_LOOPBACK[0], port, ranks, True, timeout, master_listen_fd=listening)


def check_world_size(world_size: int) -> None:
    """Check that a second Trainer in this process has as many ranks as the first.

    Raises:
        ConfigError: if it has not.
    """
    if dist.is_initialized() and dist.get_world_size() != world_size:
        raise ConfigError(
            f"This Trainer has devices * num_nodes = {world_size} ranks, but an earlier Trainer of this script has "
            f"started {dist.get_world_size()}, which all run the rest of the script. Use the same number for both, or "
            f"a script for each."
        )


def build_infra(
    layout: MimoLayout, spans: Spans, nccl: NcclOptions, global_batch_size: int, num_microbatches: int
) -> tuple[MimoModelInfra, RankBatchPlan]:
    """Build the process groups of a layout and check them against the batch sizes. Collective over the world.

    Args:
        layout: layout of all ranks.
        spans: records what this rank does.
        nccl: options of NCCL for the process groups.
        global_batch_size: samples per global batch, over all ranks.
        num_microbatches: number of microbatches that a global batch is split into.

    Returns:
        Grids and process groups, and this rank's share of every global batch.
    """
    infra = MimoModelInfra.build(layout, spans=spans, nccl=nccl)
    sizes = micro_batch_sizes(layout, global_batch_size=global_batch_size, num_microbatches=num_microbatches)
    validate_no_stub_ranks(infra.module_to_grid_map, layout.world_size)
    validate_data_loader_contract(infra, global_batch_size, sizes, num_microbatches)
    plan = RankBatchPlan.build(
        layout, dist.get_rank(), global_batch_size=global_batch_size, num_microbatches=num_microbatches
    )
    return infra, plan


def connect_ranks(model: RaggedMimoModel, infra: MimoModelInfra, *, training: bool) -> None:
    """Make the communicators that the run will use, before its first batch. Collective over the world.

    Does nothing with gloo, whose ranks are connected when a group is created.

    Args:
        model: the model, wrapped for training if it is to be trained.
        infra: process groups, the bridges included.
        training: whether the run trains; otherwise it validates, tests or predicts.
    """
    if dist.get_backend() != "gloo":
        make_communicators(infra, communicators_of(model, infra, training=training))


def start_watchdog(
    infra: MimoModelInfra, launcher: Any, device: torch.device, local_rank: int, timeout: timedelta
) -> Watchdog:
    """Start the watchdog that ends the run if this rank waits too long. Requires that all process groups exist.

    Args:
        infra: layout, process groups, and the spans of this rank.
        launcher: launcher on this node, which ends the other ranks of the node.
        device: device of this rank.
        local_rank: rank on this node. The first one started the others, which must be gone before it reports their end.
        timeout: longest time that a rank may wait for another.
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

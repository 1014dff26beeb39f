"""Modules that break one rule each, as a user's might. The line that does it ends with the name of the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lightning_mimo.microbatch import Microbatch
from lightning_mimo.strategy.module import MimoModule

Loss = tuple[torch.Tensor, torch.Tensor, Any]


class Enough(Exception):  # noqa: N818  (nothing is wrong)
    """Ends a run of which the rest would show nothing."""


def _with_loss(module: MimoModule, change: Callable[[torch.Tensor], torch.Tensor]) -> MimoModule:
    """Let a module compute its loss from what becomes of the output."""
    loss = module.loss

    def changed(output: torch.Tensor, batch: Microbatch) -> Loss:
        return loss(change(output), batch)

    module.loss = changed  # type: ignore[method-assign]
    return module


def reads_in_forward(module: MimoModule) -> MimoModule:
    def change(output: torch.Tensor) -> torch.Tensor:
        scale = output.abs().amax().item()  # fault: read
        return output * (1.0 if scale >= 0 else 0.0)

    return _with_loss(module, change)


def has_tensor_on_cpu(module: MimoModule) -> MimoModule:
    def change(output: torch.Tensor) -> torch.Tensor:
        weights = torch.ones(output.size(-1))
        return output * weights  # fault: device

    return _with_loss(module, change)


def uses_first_gpu(module: MimoModule) -> MimoModule:
    def change(output: torch.Tensor) -> torch.Tensor:
        torch.zeros(1, device="cuda:0")  # fault: other device
        return output

    return _with_loss(module, change)


def multiplies_in_float32(module: MimoModule) -> MimoModule:
    def change(output: torch.Tensor) -> torch.Tensor:
        weights = torch.eye(output.size(-1), device=output.device)
        return (output.float() @ weights).to(output.dtype)  # fault: dtype

    return _with_loss(module, change)


def copies_and_waits(module: MimoModule) -> MimoModule:
    def change(output: torch.Tensor) -> torch.Tensor:
        weights = torch.ones(output.size(-1)).to(output.device)  # fault: copy
        return output * weights

    return _with_loss(module, change)


def keeps_outputs(module: MimoModule) -> MimoModule:
    kept: list[torch.Tensor] = []

    def change(output: torch.Tensor) -> torch.Tensor:
        kept.append(output * 2)  # fault: leak
        return output

    return _with_loss(module, change)


def ends_after_forward(module: MimoModule) -> MimoModule:
    def change(output: torch.Tensor) -> torch.Tensor:
        raise Enough

    return _with_loss(module, change)


def sends_before_receiving(module: MimoModule) -> MimoModule:
    """Both ranks send first, which over NCCL neither comes out of."""

    def exchange() -> None:
        device = torch.cuda.current_device()
        other = 1 - dist.get_rank()
        dist.send(torch.zeros(4, device=device), dst=other)  # fault: order
        dist.recv(torch.zeros(4, device=device), src=other)
        raise Enough

    module.on_train_batch_start = lambda *_: exchange()  # type: ignore[method-assign]
    return module


def has_barrier_without_device(module: MimoModule) -> MimoModule:
    """torch takes the GPU under the current context, and warns."""

    def wait() -> None:
        dist.barrier()  # fault: barrier

    module.on_train_batch_start = lambda *_: wait()  # type: ignore[method-assign]
    return module


def uses_new_communicator(module: MimoModule) -> MimoModule:
    """NCCL makes the communicator of a group in the middle of a step."""

    def change(output: torch.Tensor) -> torch.Tensor:
        group = dist.new_group(backend="nccl")
        dist.all_reduce(output.detach().sum(), group=group)  # fault: communicator
        return output

    return _with_loss(module, change)


def sends_in_another_order(module: MimoModule) -> MimoModule:
    """Rank 0 sends the longer tensor first; rank 1 expects the shorter one."""

    def exchange() -> None:
        device = torch.cuda.current_device()
        if dist.get_rank() == 0:
            dist.send(torch.zeros(8, device=device), dst=1)
            dist.send(torch.zeros(4, device=device), dst=1)
        else:
            dist.recv(torch.zeros(4, device=device), src=0)  # fault: size
            dist.recv(torch.zeros(8, device=device), src=0)

    module.on_train_batch_start = lambda *_: exchange()  # type: ignore[method-assign]
    return module

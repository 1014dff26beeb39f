"""megatron-core's MimoOptimizer with the face of a ``torch.optim.Optimizer``, which Lightning and torch want."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.mimo.optimizer import MimoOptimizer, get_mimo_optimizer
from megatron.core.optimizer import OptimizerConfig

from lightning_mimo.model import SampleAlignedMimoModel


class MimoTorchOptimizer(torch.optim.Optimizer):
    """Steps the optimizers of all modules at once, with the gradient norm over all of them.

    ``param_groups`` are the very groups of the modules' optimizers on this rank, so a learning-rate scheduler from
    ``torch.optim.lr_scheduler`` works on them. Gradients are zeroed by the strategy, never by ``zero_grad``.

    Attributes:
        mimo: megatron-core's optimizer.
        grad_norm: global gradient norm of the last step, before clipping; ``None`` before the first and after a
            skipped one.
        skipped: whether the last step was skipped because a gradient was not finite.
    """

    def __init__(self, mimo: MimoOptimizer) -> None:
        # __setstate__ sets up hooks and profiling as __init__ does, but does not copy the groups, and does not refuse
        # a rank whose parameters are all frozen.
        self.__setstate__({"mimo": mimo, "defaults": {}, "state": defaultdict(dict)})
        self.mimo: MimoOptimizer
        self.grad_norm: float | None = None
        self.skipped = False

    @property
    def config(self) -> OptimizerConfig:
        return self.mimo.config

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of this rank's modules."""
        return self.mimo.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        raise AttributeError("The parameter groups belong to megatron-core's optimizers; change entries in place.")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: Lightning calls this after the schedule's backward passes, when gradients must be kept."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure (the global batch) and update the weights. Collective over the world.

        Returns:
            What the closure returned.
        """
        result = closure() if closure is not None else None
        updated, self.grad_norm, _ = self.mimo.step()
        # megatron-core has made param.grad an alias of DDP's gradient buffer. Left so, the next backward pass would add
        # to the buffer twice: once through param.grad and once through DDP's hook.
        self.mimo.zero_grad()
        self.skipped = not updated
        return result

    def state_dict(self) -> dict[str, Any]:
        """State of this rank's shards by module."""
        return self.mimo.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned on the same rank of the same layout."""
        self.mimo.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.mimo.module_infos)}, lr={self.config.lr})"


def build_optimizer(model: SampleAlignedMimoModel, config: OptimizerConfig) -> MimoTorchOptimizer:
    """Optimizer of this rank's modules. Collective over the world.

    Args:
        model: the model, its modules wrapped in DDP.
        config: Megatron's optimizer settings; ``lr`` must be set.

    Raises:
        ValueError: if ``lr`` is not set.
    """
    if config.lr is None:
        raise ValueError("OptimizerConfig(lr=...) is not set: Megatron has no default learning rate.")
    optimizer = MimoTorchOptimizer(get_mimo_optimizer(model, config))
    for group in optimizer.param_groups:
        # Megatron marks vectors (biases, layer norms) with wd_mult=0 and other exceptions with lr_mult and max_lr, but
        # leaves it to its own scheduler to act on them. With torch's schedulers it has to be done here.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        group["lr"] = group["max_lr"] * group["lr_mult"]
        # torch's Adam has a fused kernel for CPUs too, but takes it only when told to. Apex's and Transformer Engine's
        # optimizers, which megatron-core prefers where they are installed, have no such key.
        if "fused" in group:
            group["fused"] = True
    return optimizer

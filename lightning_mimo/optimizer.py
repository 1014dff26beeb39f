"""megatron-core's MimoOptimizer with the face of a ``torch.optim.Optimizer``, which Lightning and torch want."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.mimo.optimizer import MimoOptimizer, get_mimo_optimizer
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer

from lightning_mimo.data_parallel import begin_gathering, complete_gathering
from lightning_mimo.model import SampleAlignedMimoModel


class OneCollectiveMimoOptimizer(MimoOptimizer):
    """megatron-core's MimoOptimizer with one world collective per step: overflow flag and gradient norms together.

    Upstream reduces the overflow flag, the norms and the success of the step one after the other, and each norm over
    its own groups before, in float32. Here every rank adds what it holds, in float64, and each parameter counts once:
    not again for its tensor-parallel duplicates, its tied copy on the last pipeline stage or its replicas.

    Attributes:
        module_grad_norms: module name -> gradient norm of the last step, before clipping.
    """

    module_grad_norms: dict[str, float]

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, int | None]:
        """As upstream's. Collective over the world.

        Returns:
            Whether the weights were updated, the global gradient norm before clipping, and the number of zeros in all
            gradients where ``log_num_zeros_in_grad`` is set.
        """
        names = sorted(self.module_infos)
        totals = torch.zeros(1 + len(names), dtype=torch.float64, device=torch.cuda.current_device())
        totals[0] = float(self.prepare_grads())
        for i, name in enumerate(names):
            totals[1 + i] = self._squares(name)
        dist.all_reduce(totals)
        found_inf, *squares = totals.tolist()
        self.module_grad_norms = {name: square**0.5 for name, square in zip(names, squares, strict=True)}
        if found_inf:
            return False, None, None
        norm = sum(squares) ** 0.5
        for optimizer in self._inner_optimizers():
            _clip(optimizer, norm)
        zeros = self.count_zeros() if self.config.log_num_zeros_in_grad else None
        self.step_with_ready_grads()
        return True, norm, zeros

    def _inner_optimizers(self, module: str | None = None) -> list[MegatronOptimizer]:
        """Of one module or all; those for experts apart from those for all other parameters."""
        infos = self.module_infos.values() if module is None else [self.module_infos[module]]
        chained = [info.optimizer for info in infos if info.optimizer is not None]
        inner = [each for optimizer in chained for each in getattr(optimizer, "chained_optimizers", [optimizer])]
        return [optimizer for optimizer in inner if not optimizer.is_stub_optimizer]

    def _squares(self, module: str) -> torch.Tensor | float:
        """This rank's part of the sum of squared gradients of a module, so that the sum over the world is the whole."""
        total = 0.0
        for optimizer in self._inner_optimizers(module):
            if grads := optimizer.get_grads_for_grad_norm():
                squares = torch.stack(torch._foreach_norm(grads)).double().square().sum()
                # All the groups over which the parameters are divided hold the same gradients.
                group = optimizer.get_grad_stats_parallel_group()
                total = total + squares * group.size() / self.module_infos[module].grid.size
        return total


def _clip(optimizer: MegatronOptimizer, norm: float) -> None:
    config, parameters = optimizer.config, optimizer.get_parameters()
    if config.clip_grad <= 0:
        return
    if config.use_precision_aware_optimizer:
        clip_grad_by_total_norm_fp32(parameters, config.clip_grad, norm, use_decoupled_grad=True)
    else:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_grad, torch.tensor(norm, dtype=torch.float64))


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

    def __init__(self, mimo: OneCollectiveMimoOptimizer, model: SampleAlignedMimoModel) -> None:
        # __setstate__ sets up hooks and profiling as __init__ does, but does not copy the groups, and does not refuse
        # a rank whose parameters are all frozen.
        self.__setstate__({"mimo": mimo, "defaults": {}, "state": defaultdict(dict)})
        self.mimo: OneCollectiveMimoOptimizer
        self._model = model
        begin_gathering(model)
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
        complete_gathering(self._model)
        updated, self.grad_norm, _ = self.mimo.step()
        # megatron-core has made param.grad an alias of DDP's gradient buffer. Left so, the next backward pass would add
        # to the buffer twice: once through param.grad and once through DDP's hook.
        self.mimo.zero_grad()
        begin_gathering(self._model)
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
    upstream = get_mimo_optimizer(model, config)
    optimizer = MimoTorchOptimizer(OneCollectiveMimoOptimizer(upstream.module_infos, config), model)
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

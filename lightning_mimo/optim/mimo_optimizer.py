"""megatron-core's MimoOptimizer, without a collective of its own and with one loss scale for the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.mimo.optimizer import MimoOptimizer, ModuleOptimizerInfo
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler, MegatronGradScaler
from megatron.core.optimizer.optimizer import MegatronOptimizer

from lightning_mimo.mimo.parameter_names import module_of
from lightning_mimo.optim.step_reduction import DeviceReduction, HostReduction

_EPSILON = 1e-6  # as in torch.nn.utils.clip_grads_with_norm_ and in megatron-core


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What an optimizer step found and did, the same on every rank.

    Attributes:
        updated: whether the weights were changed.
        overflow: whether the step was skipped because the loss scale was too large, which is part of training in
            float16: the next step has a smaller one.
        totals: what the step went by, as Python numbers.
        group_norms: parameter group -> norm of its gradients before clipping, infinite or NaN where one of them is.
    """

    updated: bool
    overflow: bool
    totals: HostReduction
    group_norms: Mapping[str, float]

    @property
    def stop(self) -> bool:
        """Whether any rank wants the run to end after this step."""
        return self.totals.stops > 0

    @property
    def grad_norm(self) -> float:
        """Norm over all groups, before clipping."""
        return math.sqrt(sum(norm**2 for norm in self.group_norms.values()))

    @property
    def module_norms(self) -> dict[str, float]:
        """Module -> norm of its gradients before clipping, over all of its groups."""
        squares: dict[str, float] = {}
        for group, norm in self.group_norms.items():
            squares[module_of(group)] = squares.get(module_of(group), 0.0) + norm**2
        return {module: math.sqrt(square) for module, square in squares.items()}

    @property
    def problem(self) -> str:
        """What is not finite, in words, if the step was skipped."""
        if not math.isfinite(self.totals.accumulated_loss):
            return "The loss is not finite"
        groups = [repr(group) for group, norm in self.group_norms.items() if not math.isfinite(norm)]
        return f"The gradient of {' and '.join(groups)} is not finite"


class SingleSyncMimoOptimizer(MimoOptimizer):
    """Steps all modules on gradients whose norms are known on every rank already; reads them to the host once.

    Upstream reduces the overflow flag, the norms and the success of the step over the world one after the other, each
    with a read to the host, and has a loss scale for each module, which part for good when one of them overflows. Here
    the schedule's one collective brings the squares that :meth:`gradient_squares` counts (in float64, each parameter
    once: not again for its tensor-parallel duplicates, its tied copy or its replicas), so that all ranks clip by the
    same norms and skip the same steps. With torch's fused optimizers even a skipped step is decided on the device, and
    the read comes after the update.

    Attributes:
        group_names: names of the parameter groups, the same on every rank.
        grad_scaler: the loss scale; ``None`` for none.
    """

    def __init__(
        self,
        module_infos: dict[str, ModuleOptimizerInfo],
        config: OptimizerConfig,
        *,
        group_names: Sequence[str],
        clipping: Sequence[tuple[float, Sequence[str]]],
    ) -> None:
        """
        Args:
            module_infos: megatron-core's optimizers of this rank's modules. Their loss scales are taken away. Each of
                their groups says under ``"group_name"`` to which of ``group_names`` it belongs.
            config: of all modules.
            group_names: names of the parameter groups, the same on every rank.
            clipping: (largest gradient norm, names of the groups that have it together); 0 does not clip.
        """
        super().__init__(module_infos, config)
        self.group_names = list(group_names)
        self.grad_scaler = _grad_scaler(config)
        self._clipping = [(limit, list(names)) for limit, names in clipping if limit > 0 and names]
        for _, optimizer in self._inner():
            optimizer.grad_scaler = None

    def get_loss_scale(self) -> torch.Tensor:
        """The loss scale, float32 ``[1]``, on this rank's device."""
        if self.grad_scaler is not None:
            return self.grad_scaler.scale
        return torch.ones(1, device=torch.cuda.current_device())

    def scale_loss(self, loss: torch.Tensor | None) -> torch.Tensor | None:
        """Megatron's ``grad_scale_func``: what backward begins with. The schedule also calls it where there is none."""
        return loss if loss is None or self.grad_scaler is None else loss * self.grad_scaler.scale.to(loss.dtype)

    @torch.no_grad()
    def gradient_squares(self) -> torch.Tensor:
        """This rank's addends to the squared gradient norm of every parameter group: float64 ``[groups]``.

        Their sum over the world is the whole. To be called when gradients have been reduced over the replicas.
        """
        self.prepare_grads()
        squares = torch.zeros(len(self.group_names), dtype=torch.float64, device=torch.cuda.current_device())
        for module, optimizer in self._inner():
            # All the process groups over which the parameters are divided hold the same gradients.
            share = optimizer.get_grad_stats_parallel_group().size() / self.module_infos[module].grid.size
            for group in optimizer.param_groups:
                if grads := optimizer._filter_grads_for_norm(group["params"]):
                    norms = torch._foreach_norm(grads, dtype=torch.promote_types(grads[0].dtype, torch.float32))
                    i = self.group_names.index(group["group_name"])
                    squares[i] += share * torch.stack(norms).double().square().sum()
        return squares

    @torch.no_grad()
    def step(self, reduction: DeviceReduction) -> StepOutcome:
        """Clip and update, or skip what is not finite, on all ranks alike. No collective but the weights' exchange.

        Args:
            reduction: sums over all ranks; ``group_squares`` are of the gradients as they now are.
        """
        finite = torch.stack([reduction.accumulated_loss, reduction.accumulated_tokens]).isfinite().all()
        finite &= reduction.group_squares.isfinite().all()
        self._clip(reduction.group_squares)
        inner = [optimizer.optimizer for _, optimizer in self._inner()]
        decides_on_device = all(_can_skip_on_device(optimizer) for optimizer in inner)
        if decides_on_device:
            for optimizer in inner:
                optimizer.found_inf = (~finite).float()
            self.step_with_ready_grads()
        totals = reduction.read()
        figures = (totals.accumulated_loss, totals.accumulated_tokens, *totals.group_squares)
        updated = all(map(math.isfinite, figures))
        if updated and not decides_on_device:
            self.step_with_ready_grads()
        is_loss_sound = math.isfinite(totals.accumulated_loss) and 0 <= totals.accumulated_tokens < math.inf
        overflow = not updated and is_loss_sound and self._can_scale_down()
        if self.grad_scaler is not None:
            self.grad_scaler.update(not updated)
        norms = [square**0.5 for square in totals.group_squares]
        return StepOutcome(
            updated=updated,
            overflow=overflow,
            totals=totals,
            group_norms=dict(zip(self.group_names, norms, strict=True)),
        )

    def inner(self, module: str) -> Iterator[MegatronOptimizer]:
        """megatron-core's optimizers of one module on this rank."""
        yield from (optimizer for name, optimizer in self._inner() if name == module)

    def _inner(self) -> Iterator[tuple[str, MegatronOptimizer]]:
        """Module and optimizer; there is one for experts apart from that for all other parameters."""
        for module, info in self.module_infos.items():
            if info.optimizer is not None:
                for optimizer in getattr(info.optimizer, "chained_optimizers", [info.optimizer]):
                    if not optimizer.is_stub_optimizer:
                        yield module, optimizer

    def _clip(self, squares: torch.Tensor) -> None:
        for limit, names in self._clipping:
            norm = torch.stack([squares[self.group_names.index(name)] for name in names]).sum().sqrt()
            if grads := [grad for name in names for grad in self._grads_of(name)]:
                torch._foreach_mul_(grads, (limit / (norm + _EPSILON)).clamp(max=1.0))

    def _grads_of(self, group_name: str) -> Iterator[torch.Tensor]:
        for _, optimizer in self._inner():
            attribute = "decoupled_grad" if optimizer.config.use_precision_aware_optimizer else "grad"
            for group in optimizer.param_groups:
                if group.get("group_name") == group_name:
                    grads = (getattr(parameter, attribute, None) for parameter in group["params"])
                    yield from (grad for grad in grads if grad is not None)

    def _can_scale_down(self) -> bool:
        scaler = self.grad_scaler
        return isinstance(scaler, DynamicGradScaler) and bool(scaler.scale > scaler.min_scale)


def _grad_scaler(config: OptimizerConfig) -> MegatronGradScaler | None:
    """By the rules of megatron-core's get_megatron_optimizer."""
    if not (config.fp16 or config.bf16):
        return None
    if config.loss_scale:
        return ConstantGradScaler(config.loss_scale)
    if not config.fp16:
        return None
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=config.loss_scale_window,
        hysteresis=config.hysteresis,
    )


def _can_skip_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """torch's fused kernels leave everything as it is where ``found_inf`` is 1, as its GradScaler makes use of."""
    is_torch = isinstance(optimizer, torch.optim.Adam | torch.optim.SGD)  # AdamW is an Adam
    return is_torch and all(group.get("fused") for group in optimizer.param_groups)

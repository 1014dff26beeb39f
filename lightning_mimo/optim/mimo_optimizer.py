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

_EPSILON = 1e-6  # as in torch.nn.utils.clip_grads_with_norm_ and in megatron-core


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What an optimizer step found and did, the same on every rank.

    Attributes:
        updated: whether the weights were changed.
        overflow: whether the step was skipped because the loss scale was too large, which is part of training in
            float16: the next step has a smaller one.
        stop: whether any rank wants the run to end after this step.
        loss: sum of the losses of the window's batches.
        group_norms: part -> norm of its gradients before clipping, infinite or nan where one of them is.
        also: what else was added up over all ranks on the way.
    """

    updated: bool
    overflow: bool
    stop: bool
    loss: float
    group_norms: Mapping[str, float]
    also: Sequence[float] = ()

    @property
    def grad_norm(self) -> float:
        """Norm over all parts, before clipping."""
        return math.sqrt(sum(norm**2 for norm in self.group_norms.values()))

    @property
    def module_norms(self) -> dict[str, float]:
        """Module -> norm of its gradients before clipping, its parts together."""
        squares: dict[str, float] = {}
        for part, norm in self.group_norms.items():
            squares[module_of(part)] = squares.get(module_of(part), 0.0) + norm**2
        return {module: math.sqrt(square) for module, square in squares.items()}

    @property
    def problem(self) -> str:
        """What is not finite, in words, if the step was skipped."""
        if not math.isfinite(self.loss):
            return "The loss is not finite"
        parts = [repr(part) for part, norm in self.group_norms.items() if not math.isfinite(norm)]
        return f"The gradient of {' and '.join(parts)} is not finite"


class SingleSyncMimoOptimizer(MimoOptimizer):
    """Steps all modules on gradients whose norms are known on every rank already; reads them to the host once.

    Upstream reduces the overflow flag, the norms and the success of the step over the world one after the other, each
    with a read to the host, and has a loss scale for each module, which part for good when one of them overflows. Here
    the schedule's one collective brings the squares that :meth:`gradient_squares` counts (in float64, each parameter
    once: not again for its tensor-parallel duplicates, its tied copy or its replicas), so that all ranks clip by the
    same norms and skip the same steps. With torch's fused optimizers even a skipped step is decided on the device, and
    the read comes after the update.

    Attributes:
        parts: names of the parts, the same on every rank.
        grad_scaler: the loss scale; ``None`` for none.
    """

    def __init__(
        self,
        module_infos: dict[str, ModuleOptimizerInfo],
        config: OptimizerConfig,
        *,
        parts: Sequence[str],
        clipping: Sequence[tuple[float, Sequence[str]]],
    ) -> None:
        """
        Args:
            module_infos: megatron-core's optimizers of this rank's modules. Their loss scales are taken away.
            config: of all modules.
            parts: names of the parts, the same on every rank. The parameter groups say to which they belong.
            clipping: (largest gradient norm, parts that have it together); 0 does not clip.
        """
        super().__init__(module_infos, config)
        self.parts = list(parts)
        self.grad_scaler = _grad_scaler(config)
        self._clipping = [(limit, list(names)) for limit, names in clipping if limit > 0 and names]
        self._found: torch.Tensor | None = None  # ranks that want to stop, the loss, squared norms, what else to read
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
        """This rank's addends to the squared gradient norm of every part: float64 ``[parts]``.

        Their sum over the world is the whole. To be called when gradients have been reduced over the replicas.
        """
        self.prepare_grads()
        squares = torch.zeros(len(self.parts), dtype=torch.float64, device=torch.cuda.current_device())
        for module, optimizer in self._inner():
            # All the groups over which the parameters are divided hold the same gradients.
            share = optimizer.get_grad_stats_parallel_group().size() / self.module_infos[module].grid.size
            for group in optimizer.param_groups:
                if grads := optimizer._filter_grads_for_norm(group["params"]):
                    norms = torch._foreach_norm(grads, dtype=torch.promote_types(grads[0].dtype, torch.float32))
                    squares[self.parts.index(group["part"])] += share * torch.stack(norms).double().square().sum()
        return squares

    def receive(
        self, *, squares: torch.Tensor, loss: torch.Tensor, stops: torch.Tensor, also: Sequence[torch.Tensor] = ()
    ) -> None:
        """What all ranks together came to; the next :meth:`step` goes by it.

        Args:
            squares: float64 ``[parts]``, squared norms of the gradients as they now are.
            loss: float64 ``[1]``, sum of the losses of the window's batches.
            stops: float64 ``[1]``, how many ranks want the run to end.
            also: float64 ``[n]`` each, figures to read to the host on the same occasion.
        """
        self._found = torch.cat([stops, loss, squares, *also])

    @torch.no_grad()
    def step(self) -> StepOutcome:
        """Clip and update, or skip what is not finite, on all ranks alike. No collective but the weights' exchange."""
        assert self._found is not None, "step() comes after the schedule's last batch of a window"
        found, self._found = self._found, None
        own = found[: 2 + len(self.parts)]
        is_finite = own.isfinite().all()
        self._clip(own[2:])
        inner = [optimizer.optimizer for _, optimizer in self._inner()]
        decides_on_device = all(_can_skip_on_device(optimizer) for optimizer in inner)
        if decides_on_device:
            for optimizer in inner:
                optimizer.found_inf = (~is_finite).float()
            self.step_with_ready_grads()
        stops, loss, *rest = found.tolist()
        squares, also = rest[: len(self.parts)], rest[len(self.parts) :]
        updated = all(map(math.isfinite, (loss, *squares)))
        if updated and not decides_on_device:
            self.step_with_ready_grads()
        overflow = not updated and math.isfinite(loss) and self._can_scale_down()
        if self.grad_scaler is not None:
            self.grad_scaler.update(not updated)
        norms = {part: square**0.5 for part, square in zip(self.parts, squares, strict=True)}
        return StepOutcome(
            updated=updated, overflow=overflow, stop=stops > 0, loss=loss, group_norms=norms, also=tuple(also)
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
        for limit, parts in self._clipping:
            norm = torch.stack([squares[self.parts.index(part)] for part in parts]).sum().sqrt()
            if grads := [grad for part in parts for grad in self._grads_of(part)]:
                torch._foreach_mul_(grads, (limit / (norm + _EPSILON)).clamp(max=1.0))

    def _grads_of(self, part: str) -> Iterator[torch.Tensor]:
        for _, optimizer in self._inner():
            name = "decoupled_grad" if optimizer.config.use_precision_aware_optimizer else "grad"
            for group in optimizer.param_groups:
                if group.get("part") == part:
                    grads = (getattr(parameter, name, None) for parameter in group["params"])
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

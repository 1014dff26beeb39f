"""A learning-rate scheduler of its own for each module, in the one place where Lightning expects one scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from lightning_mimo.errors import ConfigError
from lightning_mimo.mimo.parameter_names import lies_under
from lightning_mimo.optim.optimizer import MimoTorchOptimizer


class PerModuleLR(LRScheduler):
    """Runs one scheduler for each of some modules; the learning rates of all others stay as they are.

    Example::

        def warm_up(optimizer):
            return LinearLR(optimizer, start_factor=0.01, total_iters=500)

        def fall(optimizer):
            return CosineAnnealingLR(optimizer, T_max=10_000)

        scheduler = PerModuleLR(optimizer, {"images": warm_up, "language": fall})
    """

    def __init__(
        self, optimizer: MimoTorchOptimizer, schedulers: Mapping[str, Callable[[torch.optim.Optimizer], LRScheduler]]
    ) -> None:
        """
        Args:
            optimizer: what ``MimoModule.build_optimizer`` returned.
            schedulers: name of a parameter group, a module's or an override's inside of one -> makes its scheduler. A
                module's also covers the groups inside of it that have none of their own.

        Raises:
            ConfigError: for a name that has no parameter group.
        """
        self.optimizer = optimizer
        groups = {group["name"]: group for group in optimizer.param_groups}
        owners = {
            name: max((key for key in schedulers if lies_under(name, key)), key=len, default="") for name in groups
        }
        if unknown := [key for key in schedulers if key not in owners.values()]:
            raise ConfigError(
                f"PerModuleLR: {unknown[0]!r} has no parameter group; there are {', '.join(map(repr, groups))}. What "
                f"lies inside a module has one where build_optimizer(overrides=...) names it; what is frozen has none."
            )
        self.schedulers = {
            key: make(_SomeGroups(optimizer, [groups[name] for name in groups if owners[name] == key]))
            for key, make in schedulers.items()
        }

    def step(self, epoch: int | None = None) -> None:
        """Advance every scheduler by one."""
        for scheduler in self.schedulers.values():
            scheduler.optimizer.step()  # or torch would warn that the scheduler came before the optimizer
            scheduler.step() if epoch is None else scheduler.step(epoch)

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """Learning rates of all groups of the optimizer."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """State of every scheduler, by name."""
        return {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            ConfigError: if that was of schedulers for other modules.
        """
        if state_dict.keys() != self.schedulers.keys():
            raise ConfigError(
                f"PerModuleLR: the state is of schedulers for {sorted(state_dict)}, but there are schedulers for "
                f"{sorted(self.schedulers)}. Give the same modules schedulers as in the run that was saved."
            )
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(state_dict[name])


class _SomeGroups(torch.optim.Optimizer):
    """Some parameter groups of an optimizer, the very dictionaries, for a scheduler to work on."""

    def __init__(self, optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, optimizer.defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # takes no closure
        """Nothing: the whole optimizer steps."""

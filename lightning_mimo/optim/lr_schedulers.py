"""A separate learning-rate scheduler for each module, combined into the single scheduler that Lightning expects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from lightning_mimo.errors import ConfigError
from lightning_mimo.mimo.parameter_names import lies_under
from lightning_mimo.optim.optimizer import MimoTorchOptimizer


class PerModuleLR(LRScheduler):
    """Runs a separate scheduler for each given module; the learning rates of other modules stay constant.

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
            optimizer: the optimizer from ``MimoModule.build_optimizer``.
            schedulers: name of a parameter group (a module, or an override inside one) -> function that creates its
                scheduler. The scheduler of a module also applies to groups inside it that have no scheduler.

        Raises:
            ConfigError: if a name has no parameter group.
        """
        self.optimizer = optimizer
        groups = {group["name"]: group for group in optimizer.param_groups}
        owners = {
            name: max((key for key in schedulers if lies_under(name, key)), key=len, default="") for name in groups
        }
        if unknown := [key for key in schedulers if key not in owners.values()]:
            raise ConfigError(
                f"PerModuleLR: {unknown[0]!r} has no parameter group; there are {', '.join(map(repr, groups))}. A "
                f"submodule has a group if build_optimizer(overrides=...) names it; frozen parameters have none."
            )
        self.schedulers = {
            key: make(_SomeGroups(optimizer, [groups[name] for name in groups if owners[name] == key]))
            for key, make in schedulers.items()
        }

    def step(self, epoch: int | None = None) -> None:
        """Advance every scheduler by one step."""
        for scheduler in self.schedulers.values():
            scheduler.optimizer.step()  # avoids torch's warning that the scheduler stepped before the optimizer
            scheduler.step() if epoch is None else scheduler.step(epoch)

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rates of all groups of the optimizer."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every scheduler by name."""
        return {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from :meth:`state_dict`.

        Raises:
            ConfigError: if the state belongs to schedulers for other modules.
        """
        if state_dict.keys() != self.schedulers.keys():
            raise ConfigError(
                f"PerModuleLR: the state belongs to schedulers for {sorted(state_dict)}, but there are schedulers for "
                f"{sorted(self.schedulers)}. Use schedulers for the same modules as in the saved run."
            )
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(state_dict[name])


class _SomeGroups(torch.optim.Optimizer):
    """Subset of an optimizer's parameter groups, sharing the dictionaries, for use by a scheduler."""

    def __init__(self, optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, optimizer.defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # takes no closure
        """Do nothing: the full optimizer performs the step."""

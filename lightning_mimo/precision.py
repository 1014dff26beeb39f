"""Megatron's precision on every grid, as a Lightning plugin."""

from __future__ import annotations

from typing import Any, override

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.plugins.precision import Precision
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo.bridges import ModalityCounts

_DTYPES = {"32-true": torch.float32, "64-true": torch.float64}
SUPPORTED = tuple(_DTYPES)


class MimoPrecision(Precision):
    """Precision of all modules. Whatever precision plugin the Trainer chose is converted to this one.

    ``64-true`` is for checking: two layouts then agree to twelve digits or more. Rotary angles and the routing
    probabilities of a mixture of experts stay float32, as megatron-core computes them.
    """

    def __init__(self, precision: str = "32-true") -> None:
        """
        Args:
            precision: one of ``SUPPORTED``.

        Raises:
            ValueError: for any other.
        """
        if precision not in SUPPORTED:
            raise ValueError(
                f"Trainer(precision={precision!r}) is not supported by MimoStrategy; supported: {', '.join(SUPPORTED)}."
            )
        self.precision = precision

    @classmethod
    def convert(cls, plugin: Precision) -> MimoPrecision:
        """The plugin of this package that means what Lightning's does.

        Raises:
            ValueError: if there is none.
        """
        return plugin if isinstance(plugin, cls) else cls(str(plugin.precision))

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters, activations and what goes over the bridges."""
        return _DTYPES[self.precision]

    @override
    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Convert a MimoModel in place, its configs too; to be called before its modules are wrapped in DDP."""
        if self.dtype == torch.float32:
            return module
        configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
        for config in configs.values():
            if isinstance(config, TransformerConfig):
                config.params_dtype = config.pipeline_dtype = self.dtype
                if config.num_moe_experts:
                    config.moe_router_dtype = "fp64"
        return module.to(self.dtype)

    @override
    def convert_input(self, data: Any) -> Any:
        """Floating-point tensors of a batch in this dtype; 32-true leaves them as the dataset made them."""
        if self.dtype == torch.float32:
            return data
        # ModalityCounts is named so that it is passed over: it holds no tensors.
        return apply_to_collection(data, (torch.Tensor, ModalityCounts), self._convert)

    def _convert(self, value: torch.Tensor | ModalityCounts) -> torch.Tensor | ModalityCounts:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(self.dtype) if is_float else value

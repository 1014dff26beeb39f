"""Megatron's precision on every grid, as a Lightning plugin."""

from __future__ import annotations

from typing import Any, override

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision

from lightning_mimo.data.shared_memory import SharedMemoryBatch
from lightning_mimo.errors import ConfigError
from lightning_mimo.mimo.dtypes import DtypePolicy

_NUMERICS = {
    "32-true": DtypePolicy(dtype=torch.float32),
    "bf16-mixed": DtypePolicy(dtype=torch.bfloat16, mixed=True),
    "bf16-true": DtypePolicy(dtype=torch.bfloat16),
    "16-mixed": DtypePolicy(dtype=torch.float16, mixed=True),
    "64-true": DtypePolicy(dtype=torch.float64),
}
SUPPORTED = tuple(_NUMERICS)


class MimoPrecision(Precision):
    """Precision of all modules. Whatever precision plugin the Trainer chose is converted to this one.

    - ``32-true``: everything in float32.
    - ``bf16-mixed``: Megatron's mixed precision, not autocast: parameters and activations in bfloat16, gradients
      accumulated and reduced in float32, float32 main parameters in the optimizer.
    - ``16-mixed``: the same in float16, with one dynamic loss scale for the whole model. (Given to a Trainer on CPUs,
      Lightning makes ``bf16-mixed`` of it; ``Trainer(plugins=MimoPrecision("16-mixed"))`` stays float16.)
    - ``bf16-true``: everything in bfloat16, also gradients and the optimizer's state. Takes the least memory; updates
      smaller than a 256th of a weight are lost.
    - ``64-true``: for checking: two layouts then agree to twelve digits or more. Rotary angles and the routing
      probabilities of a mixture of experts stay float32, as megatron-core computes them.
    """

    def __init__(self, precision: str = "32-true") -> None:
        """
        Args:
            precision: one of ``SUPPORTED``.

        Raises:
            ConfigError: for any other.
        """
        if precision not in SUPPORTED:
            raise ConfigError(
                f"Trainer(precision={precision!r}) is not supported by MimoStrategy; supported: {', '.join(SUPPORTED)}."
            )
        self.precision = precision  # type: ignore[assignment]  # one of Lightning's literals, as was checked

    @classmethod
    def convert(cls, plugin: Precision) -> MimoPrecision:
        """The plugin of this package that means what Lightning's does.

        Raises:
            ConfigError: if there is none.
        """
        if isinstance(plugin, cls):
            return plugin
        # Others (bitsandbytes, say) do not say what they are, and would be taken for the base class's 32-true.
        known = type(plugin) in (Precision, MixedPrecision, HalfPrecision, DoublePrecision)
        return cls(str(plugin.precision if known else type(plugin).__name__))

    @property
    def dtype_policy(self) -> DtypePolicy:
        """The dtypes that this precision stands for."""
        return _NUMERICS[self.precision]

    @override
    def convert_input(self, data: Any) -> Any:
        """What encoders are given in this dtype; text, masks and, with 32-true, everything as the dataset made it."""
        if self.dtype_policy.dtype == torch.float32 or not isinstance(data, list):
            return data
        return SharedMemoryBatch(
            {**microbatch, "modality_inputs": apply_to_collection(inputs, torch.Tensor, self._convert)}
            if (inputs := microbatch.get("modality_inputs"))
            else microbatch
            for microbatch in data
        )

    def _convert(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.dtype_policy.dtype) if value.is_floating_point() else value

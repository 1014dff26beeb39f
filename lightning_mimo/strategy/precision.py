"""Lightning plugin that selects Megatron's precision for all modules."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Precision of all modules. The precision plugin that the Trainer selects is converted to this one.

    - ``32-true``: everything in float32.
    - ``bf16-mixed``: Megatron's mixed precision, not autocast: parameters and activations in bfloat16, gradients
      accumulated and reduced in float32, float32 main parameters in the optimizer.
    - ``16-mixed``: the same in float16, with one dynamic loss scale for the whole model. (For a Trainer on CPUs,
      Lightning converts this to ``bf16-mixed``; ``Trainer(plugins=MimoPrecision("16-mixed"))`` stays float16.)
    - ``bf16-true``: everything in bfloat16, including gradients and optimizer state. Uses the least memory; updates
      smaller than 1/256 of a weight are lost.
    - ``64-true``: for tests: two layouts agree to twelve digits or more. Rotary angles and the routing probabilities
      of a mixture of experts stay float32, as megatron-core computes them.
    """

    def __init__(self, precision: str = "32-true") -> None:
        """
        Args:
            precision: one of ``SUPPORTED``.

        Raises:
            ConfigError: for any other value.
        """
        if precision not in SUPPORTED:
            raise ConfigError(
                f"Trainer(precision={precision!r}) is not supported by MimoStrategy; supported: {', '.join(SUPPORTED)}."
            )
        self.precision = precision  # type: ignore[assignment]  # checked above: one of Lightning's literals

    @classmethod
    def convert(cls, plugin: Precision) -> MimoPrecision:
        """Convert a precision plugin of Lightning to the equivalent MimoPrecision.

        Raises:
            ConfigError: if there is no equivalent.
        """
        if isinstance(plugin, cls):
            return plugin
        # Other plugins, such as bitsandbytes, inherit precision "32-true" from the base class, which would be wrong.
        known = type(plugin) in (Precision, MixedPrecision, HalfPrecision, DoublePrecision)
        return cls(str(plugin.precision if known else type(plugin).__name__))

    @property
    def dtype_policy(self) -> DtypePolicy:
        """The dtypes of this precision."""
        return _NUMERICS[self.precision]

    @override
    def convert_input(self, data: Any) -> Any:
        """Convert the inputs of encoders to this dtype, with 32-true only those in float64. The rest is unchanged."""
        if not isinstance(data, list) or not all(isinstance(microbatch, Mapping) for microbatch in data):
            return data  # what several loaders give at once is refused later
        return SharedMemoryBatch(
            {**microbatch, "modality_inputs": apply_to_collection(inputs, torch.Tensor, self._convert)}
            if (inputs := microbatch.get("modality_inputs"))
            else microbatch
            for microbatch in data
        )

    def _convert(self, value: torch.Tensor) -> torch.Tensor:
        dtype = self.dtype_policy.dtype
        # With float32, a module that a user keeps in a shorter dtype may be given inputs in it; numpy makes float64.
        is_meant = value.is_floating_point() and (dtype != torch.float32 or value.dtype == torch.float64)
        if not is_meant or value.dtype == dtype:
            return value
        # Pinned memory stays pinned: Lightning converts before it moves a batch to the device.
        return torch.empty(value.shape, dtype=dtype, device=value.device, pin_memory=value.is_pinned()).copy_(value)

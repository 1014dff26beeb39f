"""Megatron's precision on every grid, as a Lightning plugin."""

from __future__ import annotations

from lightning.pytorch.plugins.precision import Precision

SUPPORTED = ("32-true",)


class MimoPrecision(Precision):
    """Precision of all modules. Whatever precision plugin the Trainer chose is converted to this one."""

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

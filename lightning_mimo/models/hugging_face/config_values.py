"""Values of a transformers config, read the same from every supported version, and refused where they say too much."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from lightning_mimo.errors import ConfigError
from lightning_mimo.models.sizes import Activation, RopeScaling

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


def refuse(config: Any, setting: str, remedy: str) -> ConfigError:
    """The error about a setting of a config.json that this package's model cannot follow."""
    return ConfigError(f"config.json of a {config.model_type!r} model: {setting} is not supported. {remedy}")


def activation_of(config: Any, name: str) -> Activation:
    """A field of a config that names an activation.

    Raises:
        ConfigError: for one that there is not.
    """
    value = getattr(config, name)
    if value not in _ACTIVATIONS:
        raise refuse(config, f"{name}={value!r}", f"Supported: {', '.join(sorted(_ACTIVATIONS))}.")
    return _ACTIVATIONS[value]


def rotary_of(config: Any) -> tuple[float, RopeScaling | None]:
    """Base and scaling of rotary positions.

    Raises:
        ConfigError: for another kind than the plain one and Llama 3.1's.
    """
    fields = _rope_fields(config)
    kind = fields.get("rope_type", fields.get("type", "default"))
    base = fields.get("rope_theta", getattr(config, "rope_theta", None))
    if kind not in ("default", "llama3") or base is None:
        raise refuse(
            config, f"rope_type={kind!r}", "Supported: 'default' and 'llama3'; take a model with one of these."
        )
    if (part := fields.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))) not in (None, 1.0):
        raise refuse(config, f"partial_rotary_factor={part}", "Supported: 1.0.")
    if kind == "default":
        return float(base), None
    return float(base), RopeScaling(
        factor=fields["factor"],
        low_freq_factor=fields["low_freq_factor"],
        high_freq_factor=fields["high_freq_factor"],
        original_max_position_embeddings=fields["original_max_position_embeddings"],
    )


def mrope_section_of(config: Any) -> tuple[int, ...]:
    """How many rotary frequencies turn with positions in time, in height and in width."""
    return tuple(_rope_fields(config).get("mrope_section", (16, 24, 24)))  # as transformers, where the file has none


def _rope_fields(config: Any) -> dict[str, Any]:
    # transformers 5 has everything in rope_parameters, version 4 has the base apart.
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def is_tied(config: Any) -> bool:
    """Whether the head shares the word embeddings, in a model whose config has a ``text_config``."""
    # Version 4 goes by the text's config alone; that of the whole says True wherever the file says nothing.
    counts = int(version("transformers").partition(".")[0]) >= 5
    # transformers 5 keeps it on the outside alone, where the file has all fields there.
    in_text = getattr(config.text_config, "tie_word_embeddings", False)
    return bool(in_text or (counts and getattr(config, "tie_word_embeddings", False)))


def sliding_window_of(config: Any) -> int | None:
    """Tokens back to which attention reaches, or ``None`` where it reaches all."""
    window = getattr(config, "sliding_window", None)
    return window if getattr(config, "use_sliding_window", True) else None

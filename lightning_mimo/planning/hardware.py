"""Devices and their connections, as data: what the prices of a plan are computed from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml

from lightning_mimo.errors import ConfigError
from lightning_mimo.planning.gpu_kernels import DeviceType

DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True, kw_only=True)
class Link:
    """Connection between two devices.

    Attributes:
        bandwidth: bytes per second in one direction, that one device reaches.
        latency: seconds until a message of no bytes has arrived.
    """

    bandwidth: float
    latency: float

    def seconds(self, size: float) -> float:
        """Seconds to send a message of ``size`` bytes."""
        return self.latency + size / self.bandwidth

    def all_reduce(self, size: float, ranks: int, *, messages: float = 1) -> float:
        """Seconds of all-reduces of ``size`` bytes together, with the ring algorithm."""
        return 2 * self.all_gather(size, ranks, messages=messages)

    def all_gather(self, size: float, ranks: int, *, messages: float = 1) -> float:
        """Seconds of all-gathers or reduce-scatters of ``size`` bytes (the gathered size) together."""
        if ranks == 1:
            return 0.0
        steps = math.log2(ranks)  # the latency of trees, which libraries use for small messages
        return messages * self.latency * steps + size * (ranks - 1) / ranks / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A cluster of equal nodes.

    Attributes:
        name: of the device.
        sources: where the figures come from; which of them are assumptions.
        devices_per_node: devices that ``within_node`` connects.
        memory: bytes of one device.
        flops: dtype -> peak FLOP/s of matrix products, without sparsity.
        matmul_efficiency: share of that peak that large matrix products reach.
        attention_efficiency: share of that peak that fused attention reaches.
        memory_bandwidth: bytes per second that elementwise operations reach.
        launch: seconds between two operations on the host; a pass takes at least its operations times this.
        step_overhead: seconds of a step in which no device works: the Trainer's loop, callbacks, logging.
        within_node: connection of devices of one node.
        between_nodes: connection of devices of different nodes, per device.
        device_type: of torch, ``cuda`` or ``cpu``; what some operations read, write and keep depends on it.
    """

    name: str
    sources: tuple[str, ...]
    devices_per_node: int
    memory: int
    flops: Mapping[str, float]
    matmul_efficiency: float
    attention_efficiency: float
    memory_bandwidth: float
    launch: float
    step_overhead: float
    within_node: Link
    between_nodes: Link
    device_type: DeviceType = "cuda"

    def link(self, span: int) -> Link:
        """Connection within a group that spans ``span`` consecutive ranks, from a node's first one."""
        return self.within_node if span <= self.devices_per_node else self.between_nodes

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s in a dtype.

        Raises:
            ConfigError: if the file has none for it.
        """
        if dtype not in self.flops:
            raise ConfigError(
                f"--hardware={self.name} has no flops for {dtype}; it has {', '.join(self.flops)}. Add a line to its "
                f"file, or choose another precision."
            )
        return self.flops[dtype]


def shipped() -> list[str]:
    """Names of the hardware files in this package."""
    folder = resources.files("lightning_mimo.planning").joinpath("hardware_data")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_hardware(name: str) -> Hardware:
    """Read a hardware file.

    Args:
        name: one of :func:`shipped`, or the path of a YAML file with the fields of :class:`Hardware`.

    Raises:
        ConfigError: if there is no such file, or a field is missing, unknown or no positive number.
    """
    if name in shipped():
        file = resources.files("lightning_mimo.planning").joinpath("hardware_data", f"{name}.yaml")
        return _parse(name, file.read_text())
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"--hardware={name}: there is no such file and no such hardware; choose {', '.join(shipped())}, or give a "
            f"YAML file."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hardware={name} cannot be read as text: {error}") from None
    return _parse(name, text)


def _parse(name: str, text: str) -> Hardware:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--hardware={name} is no YAML: {' '.join(str(error).split())}") from None
    known = [field.name for field in fields(Hardware)]
    needed = {field.name for field in fields(Hardware) if field.default is MISSING}
    if not isinstance(values, dict) or not needed <= set(values) <= set(known):
        given = set(values) if isinstance(values, dict) else set()
        problem = f"lacks {', '.join(sorted(needed - given))}" if needed - given else "has unknown keys"
        if unknown := sorted(map(str, given - set(known))):
            problem += f" ({', '.join(unknown)})" if problem.startswith("has") else f", and knows {', '.join(unknown)}"
        raise ConfigError(f"--hardware={name} {problem}; a hardware file has the keys {', '.join(known)}.")
    for key in ("within_node", "between_nodes"):
        if not isinstance(values[key], dict) or set(values[key]) != {"bandwidth", "latency"}:
            raise ConfigError(f"--hardware={name}: {key} must have the keys bandwidth and latency.")
        values[key] = Link(**{each: _number(name, f"{key}.{each}", n) for each, n in values[key].items()})
    if not isinstance(values["flops"], dict) or not values["flops"] or set(values["flops"]) - set(DTYPES):
        raise ConfigError(f"--hardware={name}: flops must map dtypes ({', '.join(DTYPES)}) to FLOP/s.")
    values["flops"] = {dtype: _number(name, f"flops.{dtype}", n) for dtype, n in values["flops"].items()}
    for key in ("matmul_efficiency", "attention_efficiency", "memory_bandwidth", "launch", "step_overhead"):
        values[key] = _number(name, key, values[key])
    for key in ("matmul_efficiency", "attention_efficiency"):
        if values[key] > 1:
            raise ConfigError(f"--hardware={name}: {key}={values[key]:g} is a share of the peak, at most 1.")
    for key in ("devices_per_node", "memory"):
        values[key] = int(_number(name, key, values[key]))
    if values.get("device_type", "cuda") not in get_args(DeviceType):
        raise ConfigError(
            f"--hardware={name}: device_type={values['device_type']!r} is not one of {', '.join(get_args(DeviceType))}."
        )
    values["sources"] = tuple(map(str, values["sources"] or ()))
    return Hardware(**values)


def _number(name: str, key: str, value: Any) -> float:
    """A positive number; YAML reads ``9.0e11`` without a sign in its exponent as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf or isinstance(value, bool):
        raise ConfigError(f"--hardware={name}: {key}={value!r} must be a positive number.")
    return number

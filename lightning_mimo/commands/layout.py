"""``lightning-mimo layout``: draws the layout of a config without importing torch or Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lightning_mimo.commands.yaml_file import read_value, read_yaml
from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.diagram import draw_layout
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import ModuleParallelism


def picture_of(arguments: Sequence[str]) -> str:
    """Draw the layout of ``--config FILE``, with overrides ``--dotted.key=value``.

    Raises:
        ConfigError: if the config has no MimoStrategy, or its layout cannot run.
    """
    config = merged_config(arguments)
    trainer = config.get("trainer", {})
    if not isinstance(trainer, dict):
        raise ConfigError(f"trainer must have keys and values, but is {trainer!r}.")
    strategy = trainer.get("strategy")
    strategy = (strategy.get("init_args") if isinstance(strategy, dict) else None) or {}
    if not isinstance(strategy.get("modules"), dict):
        raise ConfigError(
            "The config has no trainer.strategy.init_args.modules that maps module names to sizes. Give --config FILE "
            "with trainer.strategy.class_path: lightning_mimo.MimoStrategy and, for example, init_args.modules: "
            "{images: {dp: 2}, language: {tp: 2}}."
        )
    modules = {name: _parallelism(name, sizes) for name, sizes in strategy["modules"].items()}
    layout = MimoLayout.resolve(
        modules,
        world_size=_number_of_devices(trainer.get("devices")) * _number_of_nodes(trainer.get("num_nodes")),
        colocate=bool(strategy.get("colocate", False)),
    )
    global_batch_size: Any = strategy.get("global_batch_size")  # refused below if it is missing
    return draw_layout(
        layout, global_batch_size=global_batch_size, num_microbatches=strategy.get("num_microbatches", 1)
    )


def merged_config(arguments: Sequence[str]) -> dict[str, Any]:
    """All ``--config FILE`` and ``--dotted.key=value`` of a command line as one config, the later ones before.

    Raises:
        ConfigError: if a file or a value cannot be read, or an argument is neither.
    """
    config: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not equals:
            value = rest.pop(0) if rest else ""
        if key in ("--config", "-c"):
            _merge(config, read_yaml(value))
        elif key.startswith("--"):
            nested: Any = read_value(value, key)
            for part in reversed(key[2:].split(".")):
                nested = {part: nested}
            _merge(config, nested)
        else:
            raise ConfigError(f"{key!r} is not understood; write --config FILE or --dotted.key=value.")
    return config


def check_config_files(arguments: Sequence[str]) -> None:
    """Check that all config files can be read, before large packages are imported.

    Raises:
        ConfigError: naming the file that cannot.
    """
    for argument, following in pairwise([*arguments, ""]):
        key, equals, value = argument.partition("=")
        if key in ("--config", "-c"):
            read_yaml(value if equals else following)


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _parallelism(name: str, sizes: dict[str, Any] | None) -> ModuleParallelism:
    sizes = {} if sizes is None else sizes
    if not isinstance(sizes, dict):
        raise ConfigError(f"Module {name!r} is given as {sizes!r}; write its sizes as a mapping such as {{tp: 2}}.")
    known = ModuleParallelism.__dataclass_fields__
    unknown = sorted(set(sizes) - set(known))
    if unknown:
        raise ConfigError(f"Module {name!r} has unknown keys {', '.join(unknown)}; known are {', '.join(known)}.")
    return ModuleParallelism(**sizes)


def _number_of_devices(devices: object) -> int:
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, int) and not isinstance(devices, bool) and devices > 0:
        return devices
    raise ConfigError(
        f"trainer.devices={devices!r}: to draw a layout the number must be known; give --trainer.devices=N."
    )


def _number_of_nodes(nodes: object) -> int:
    if nodes is None:
        return 1
    if isinstance(nodes, int) and not isinstance(nodes, bool) and nodes > 0:
        return nodes
    raise ConfigError(f"trainer.num_nodes={nodes!r} must be a whole number of at least 1.")

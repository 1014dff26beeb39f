"""The command line: ``lightning-mimo fit | validate | test | predict | layout``.

``layout`` needs neither torch nor Lightning, so both are imported only for the other commands.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_mimo.known_warnings import hush_known_warnings
from lightning_mimo.layout import MimoLayout
from lightning_mimo.parallelism import LayoutError, ModuleParallelism
from lightning_mimo.picture import draw_layout

_USAGE = """usage: lightning-mimo {fit,validate,test,predict,layout} --config FILE [--KEY=VALUE ...]
       lightning-mimo checkpoint inspect PATH | export PATH OUT | import FILE PATH

  fit        train; with --trace DIR also record one step over all ranks, as a picture and for Perfetto
  validate   evaluate on the validation data        test      on the test data
  predict    write the model's answers              layout    print which module sits on which ranks; starts nothing

'lightning-mimo fit --help' lists every key; any of them can be given as --dotted.key=value.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script and of ``python -m lightning_mimo``."""
    if arguments is not None:
        sys.argv[1:] = arguments  # LightningCLI warns when it is given arguments beside those of the command line
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["layout", "--help"]:
        print(_USAGE, end="")
        return
    # A console script does not look for modules in the current folder, but the classes named in a config lie there.
    sys.path.insert(0, str(Path.cwd()))
    try:
        if arguments[0] == "layout":
            print(picture_of(arguments[1:]))
        elif arguments[0] == "checkpoint":
            print(checkpoint_tool(arguments[1:]))
        else:
            _run_lightning()
    except LayoutError as error:
        print(f"lightning-mimo: error: {error}", file=sys.stderr)
        sys.exit(2)


def picture_of(arguments: Sequence[str]) -> str:
    """Draw the layout of ``--config FILE`` with ``--dotted.key=value`` on top.

    Raises:
        LayoutError: if the config has no MimoStrategy, or its layout cannot run.
    """
    config = _read_config(arguments)
    trainer = config.get("trainer") or {}
    strategy = trainer.get("strategy")
    strategy = (strategy.get("init_args") if isinstance(strategy, dict) else None) or {}
    if not isinstance(strategy.get("modules"), dict):
        raise LayoutError(
            "The config has no trainer.strategy.init_args.modules that maps module names to sizes. Give --config FILE "
            "with trainer.strategy.class_path: lightning_mimo.MimoStrategy and, say, init_args.modules: "
            "{images: {dp: 2}, language: {tp: 2}}."
        )
    modules = {name: _parallelism(name, sizes) for name, sizes in strategy["modules"].items()}
    layout = MimoLayout.resolve(
        modules,
        world_size=_number_of_devices(trainer.get("devices")) * int(trainer.get("num_nodes") or 1),
        colocate=bool(strategy.get("colocate", False)),
    )
    return draw_layout(
        layout,
        global_batch_size=strategy.get("global_batch_size"),
        num_microbatches=strategy.get("num_microbatches", 1),
    )


def checkpoint_tool(arguments: Sequence[str]) -> str:
    """Run ``inspect``, ``export`` or ``import``, and say what was done.

    Raises:
        LayoutError: for anything that is wrong with the arguments or the files.
    """
    match list(arguments):
        case ["inspect" | "export" | "import", *paths] if len(paths) == (1 if arguments[0] == "inspect" else 2):
            from lightning_mimo.checkpoint import tools
            from lightning_mimo.checkpoint.directory import CheckpointError
        case _:
            raise LayoutError(
                "write: checkpoint inspect PATH, checkpoint export PATH OUT.safetensors, or checkpoint import "
                "FILE.safetensors PATH.ckpt"
            )
    one, two = Path(paths[0]), Path(paths[-1])
    try:
        if arguments[0] == "inspect":
            return tools.inspect(one)
        if arguments[0] == "export":
            return f"{tools.export(one, two)} parameters written to {two}"
        return f"{tools.import_weights(one, two)} parameters written to {two}"
    except CheckpointError as error:
        raise LayoutError(str(error)) from error


def _read_config(arguments: Sequence[str]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not equals:
            value = rest.pop(0) if rest else ""
        if key in ("--config", "-c"):
            if not Path(value).is_file():
                raise LayoutError(f"--config {value}: there is no such file.")
            _merge(config, yaml.safe_load(Path(value).read_text()) or {})
        elif key.startswith("--"):
            nested: Any = yaml.safe_load(value)
            for part in reversed(key[2:].split(".")):
                nested = {part: nested}
            _merge(config, nested)
        else:
            raise LayoutError(f"{key!r} is not understood; write --config FILE or --dotted.key=value.")
    return config


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _parallelism(name: str, sizes: dict[str, Any] | None) -> ModuleParallelism:
    sizes = {} if sizes is None else sizes
    if not isinstance(sizes, dict):
        raise LayoutError(f"Module {name!r} is given as {sizes!r}; write its sizes as, say, {{tp: 2}}.")
    known = ModuleParallelism.__dataclass_fields__
    unknown = sorted(set(sizes) - set(known))
    if unknown:
        raise LayoutError(f"Module {name!r} has unknown keys {', '.join(unknown)}; known are {', '.join(known)}.")
    return ModuleParallelism(**sizes)


def _number_of_devices(devices: object) -> int:
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    raise LayoutError(
        f"trainer.devices={devices!r}: to draw a layout the number must be known; give --trainer.devices=N."
    )


def _run_lightning() -> None:
    hush_known_warnings()
    import lightning.pytorch as pl

    from lightning_mimo.cluster import check_slurm_tasks
    from lightning_mimo.fit_options import MimoCLI
    from lightning_mimo.module import MimoModule

    check_slurm_tasks()
    MimoCLI(
        MimoModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
    )

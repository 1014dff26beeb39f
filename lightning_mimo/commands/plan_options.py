"""The options of ``lightning-mimo plan``, checked before anything large is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_mimo.commands.sizes import memory_size
from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MOST_RANKS

USAGE = (
    "lightning-mimo plan --config FILE --gpus N[,N...] [--memory 80GiB] [--hardware h100|FILE] [--measure[=rates]]\n"
    "           [--sample=data | --spread MODULE=SIGMA,...] [--write OUT.yaml] [--picture OUT.png] [--KEY=VALUE ...]\n"
    "       lightning-mimo plan --config FILE --compare TRACE [--hardware h100|FILE] [--measure[=rates]]\n"
    "           [--sample=data] [--picture OUT.png] [--KEY=VALUE ...]"
)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of the command line.

    Attributes:
        gpus: numbers of devices to plan for.
        memory: bytes of a device; ``None`` takes the hardware's.
        hardware: name or file of the hardware.
        measure: what to measure of this machine's device: ``rates`` of its operations, ``layers`` of the model as well,
            or ``None`` for nothing.
        from_data: whether to plan for the samples of the training data, not for one that the model describes.
        spread: module -> standard deviation of the logarithm of its samples' costs; empty for equal samples.
        write: file for the config of the best plan.
        picture: file for the timeline of the best plan.
        compare: trace of a run to compare with.
    """

    gpus: tuple[int, ...]
    memory: float | None
    hardware: str
    measure: Literal["rates", "layers"] | None
    from_data: bool
    spread: dict[str, float]
    write: Path | None
    picture: Path | None
    compare: Path | None


def parse_options(arguments: Sequence[str]) -> tuple[PlanOptions, list[str]]:
    """Parse the options of ``plan``, and return the other arguments, which are those of ``fit``.

    Raises:
        ConfigError: if an option has no valid value, or options exclude one another.
    """
    parser = argparse.ArgumentParser(prog="lightning-mimo plan", usage=USAGE, allow_abbrev=False)
    parser.add_argument("--gpus", help="devices to plan for; several numbers give a curve")
    parser.add_argument("--memory", help="memory of a device, such as 80GiB; default: the hardware's")
    parser.add_argument("--hardware", default="h100", help="h100, h200, a100, b200, cpu, or a YAML file")
    parser.add_argument(
        "--measure",
        nargs="?",
        const="layers",
        choices=("layers", "rates"),
        help="measure this machine's device in place of its figures, and time the model's layers unless =rates",
    )
    parser.add_argument("--sample", choices=("longest", "data"), default="longest", help="what a step is made of")
    parser.add_argument("--spread", help="how much samples differ: images=0.8 is the deviation of log(cost)")
    parser.add_argument("--write", help="write the config with the best plan to this file")
    parser.add_argument("--picture", help="draw the simulated step of the best plan, as a PNG")
    parser.add_argument("--compare", help="trace of a run (step=N.json of fit --trace) to compare with the simulation")
    found, rest = parser.parse_known_args(list(arguments))
    if (found.gpus is None) == (found.compare is None):
        raise ConfigError("plan needs either --gpus=N, the devices to plan for, or --compare=TRACE of a run.")
    if found.compare is not None and (found.write or found.spread):
        raise ConfigError("--compare takes the layout of the config; --write and --spread do not apply.")
    if found.spread is not None and found.sample == "data":
        raise ConfigError(
            "--spread says how much samples differ, and --sample=data takes that from your data; give one of them."
        )
    options = PlanOptions(
        gpus=() if found.gpus is None else _gpus(found.gpus),
        memory=None if found.memory is None else memory_size(found.memory),
        hardware=found.hardware,
        measure=found.measure,
        from_data=found.sample == "data",
        spread={} if found.spread is None else _spread(found.spread),
        write=_file(found.write, "--write", (".yaml", ".yml")),
        picture=_file(found.picture, "--picture", (".png",)),
        compare=None if found.compare is None else Path(found.compare),
    )
    return options, rest


def _gpus(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() and 1 <= int(number) <= MOST_RANKS for number in numbers):
        raise ConfigError(f"--gpus={text}: write whole numbers from 1 to {MOST_RANKS:,}, separated by commas.")
    return tuple(sorted({int(number) for number in numbers}))


def _spread(text: str) -> dict[str, float]:
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            sigma = float(value)
        except ValueError:
            sigma = -1.0
        if not name or not 0 <= sigma <= 3:
            raise ConfigError(f"--spread={text}: write MODULE=SIGMA with a SIGMA from 0 to 3, such as images=0.8.")
        found[name] = sigma
    return found


def _file(text: str | None, option: str, endings: tuple[str, ...]) -> Path | None:
    if text is None:
        return None
    path = Path(text)
    if path.suffix not in endings:
        raise ConfigError(f"{option}={text}: the name must end with {' or '.join(endings)}.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}={text}: there is no folder {path.absolute().parent}.")
    return path

"""Trains a model in a layout and in one process, and describes the differences."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_mimo.verification.comparison import LIMIT, Differences, are_equal, likely_reasons
from lightning_mimo.verification.scale import ScaledLayout, divided_only, one_process
from lightning_mimo.verification.trial import STEPS, Subject, find_differences, record_reference

_WORDS = {"initial": "initial weights", "loss": "loss", "gradient": "gradients", "weight": "weights after training"}


def verify(subject: Subject, layout: ScaledLayout) -> tuple[bool, str]:
    """Train two steps in a layout and in one process, in float64, and compare every parameter.

    Forks; call it where torch.distributed is not initialized.

    Args:
        subject: what is trained.
        layout: on which ranks.

    Returns:
        Whether they are equal, and a report.

    Raises:
        ConfigError: if a run failed.
    """
    with _temporary_folder() as folder:
        reference = folder / "reference.pt"
        record_reference(subject, one_process(layout), reference)
        found = find_differences(subject, layout, reference, _new(folder / "all"))
        lines = list(_table(layout, found))
        if equal := are_equal(found):
            lines.append(f"equal: every difference is below {LIMIT:g}, the rounding of float64")
        else:
            lines += ["DIFFERENT. Each axis by itself:", *_each_axis(subject, layout, reference, folder)]
            lines += ["likely reasons:", *(f"  - {reason}" for reason in likely_reasons(found))]
    return equal, "\n".join(lines)


def _table(layout: ScaledLayout, found: Differences) -> Iterator[str]:
    yield f"{STEPS} steps of {layout.global_batch_size} samples in float64, against one process:"
    yield ""
    yield f"{'':24} largest relative difference"
    for kind, difference in found.items():
        yield f"{_WORDS[kind]:24} {difference.value:9.1e}  {difference.name}".rstrip()
    yield ""


def _each_axis(subject: Subject, layout: ScaledLayout, reference: Path, folder: Path) -> Iterator[str]:
    for module, axis in layout.divided:
        alone = divided_only(layout, module, axis)
        found = find_differences(subject, alone, reference, _new(folder / f"{axis}-{module}"))
        kind = next((kind for kind, each in found.items() if not are_equal({kind: each})), None)
        if kind is None:
            yield f"  {axis}=2 of {module}: equal"
        else:
            place = f" in {found[kind].name}" if found[kind].name else ""
            yield f"  {axis}=2 of {module}: {_WORDS[kind]} differ by {found[kind].value:.1e}{place}"


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    folder, owner = Path(tempfile.mkdtemp(prefix="lightning-mimo-verify-")), os.getpid()
    try:
        yield folder
    finally:
        if os.getpid() == owner:  # forked processes come by here, too
            shutil.rmtree(folder)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder

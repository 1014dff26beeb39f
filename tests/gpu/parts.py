"""What is found out on one GPU, in parts that do not depend on one another."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.gpu.model import flops_of_step
from tests.gpu.ranks import Ended, run_ranks
from tests.gpu.run import Run
from tests.gpu.warned import unexpected_warnings

Figures = dict[str, Any]
_PEAK_FLOPS = 989e12  # bfloat16 without sparsity, of an H100 or H200 (SXM), by the datasheet

_HANGS = 1  # rank
_PREDICTED = ", predicted"
_REHEARSAL = 600.0  # seconds, on CPUs that others use, too

SMALL = Run()
LARGE = Run(
    precision="bf16-mixed",
    distributed=True,
    hidden=2048,
    layers=16,
    heads=16,
    vocabulary=32064,
    length=2048,
    batch=8,
    steps=14,
    profile=True,
    timeout=120,
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One question.

    Attributes:
        runs: name -> what is run for it, at the same time if ``together``.
        judge: what came out -> figures for the table. Raises where something is wrong.
        limit: seconds.
        together: whether other parts may run on the GPU on_first_wait: nothing in it is timed.
    """

    runs: Mapping[str, Run]
    judge: Callable[[Mapping[str, Ended]], Figures]
    limit: float
    together: bool = True


def _close(found: list[float], wanted: list[float], tolerance: float) -> float:
    """The largest relative difference.

    Raises:
        ValueError: if it is above the tolerance.
    """
    largest = max(abs(one - other) / abs(other) for one, other in zip(found, wanted, strict=True))
    if not largest <= tolerance:
        raise ValueError(f"losses {found} are not those wanted, {wanted}: they differ by {largest:.2e}")
    return largest


def _differing(ended: list[Figures], when: str) -> list[str]:
    """Parameters whose checksums are not the same in all results that have them."""
    seen: dict[str, set[int]] = {}
    for result in ended:
        for name, value in result["checksums"][when].items():
            seen.setdefault(name, set()).add(value)
    return sorted(name for name, values in seen.items() if len(values) > 1)


def judge_curve(ended: Mapping[str, Ended]) -> Figures:
    cpu, gpu = (ended[name].result() for name in ("cpu", "gpu"))
    if differing := _differing([cpu, gpu], "start"):
        raise ValueError(f"initial weights differ between CPU and GPU: {differing[:3]} and {len(differing)} in all")
    figures = {
        "initial weights": f"{len(gpu['checksums']['start'])} parameters as on the CPU, bit for bit",
        "float32 loss, largest difference": _close(gpu["losses"], cpu["losses"], 1e-3),
        "last loss": gpu["losses"][-1],
    }
    for name in ("bf16", "bf16-overlapped", "recomputed"):
        figures[f"{name} loss, largest difference"] = _close(ended[name].result()["losses"], cpu["losses"], 0.05)
    return figures


def judge_evaluation(ended: Mapping[str, Ended]) -> Figures:
    result, alone, apart = (ended[name].result() for name in ("evaluate", "alone", "alone, apart"))
    return {
        "val/loss": result["validation"]["val/loss"],
        "predicted": str(result["predicted"][:2]),
        "without training, two ranks: loss, difference from one rank": _close(apart["losses"], alone["losses"], 1e-3),
    }


def judge_packed(ended: Mapping[str, Ended]) -> Figures:
    cpu = ended["cpu"].result()["losses"]
    return {
        f"{name} loss, largest difference from float32 on the CPU": _close(
            ended[name].result()["losses"], cpu, 0.05 if name == "bf16" else 1e-3
        )
        for name in ended
        if name != "cpu"
    }


def judge_attention(ended: Mapping[str, Ended]) -> Figures:
    result = ended["attention"].result()
    if result["code"]:
        raise ValueError(f"pytest ended with code {result['code']}: {result}")
    return result


def judge_ranks(ended: Mapping[str, Ended]) -> Figures:
    figures: Figures = {}
    one = ended["one"].result()["losses"]
    for name in ended:
        if name == "one":
            continue
        try:
            ended[name].result()
            bf16 = name.startswith("pipeline")
            figures[f"{name}: loss, largest difference from one rank"] = _close(
                ended[name].results[-1]["losses"], one, 0.05 if bf16 else 1e-3
            )
            if name.startswith("dp2"):
                for when in ("start", "end"):
                    if differing := _differing(ended[name].results, when):
                        raise ValueError(f"{len(differing)} weights differ at the {when}: {differing[:3]}")
                figures[f"{name}: weights"] = "the same on both replicas at the start and at the end"
        except (RuntimeError, ValueError) as error:
            figures[f"{name}: FAILED"] = str(error)
    return figures


def judge_communicators(ended: Mapping[str, Ended]) -> Figures:
    made = {name: each.result()["communicators"] for name, each in ended.items()}
    return {
        f"{name}: communicators": f"{each['number']} made in {each['seconds']:.2f} s, {each['mib_on_gpu']} MiB for all "
        f"ranks on this GPU; {each['planned_mib']:.0f} MiB planned for rank 0"
        for name, each in made.items()
    }


def judge_hang(ended: Mapping[str, Ended]) -> Figures:
    figures: Figures = {}
    for name, each in ended.items():
        said = [line for line in each.text.splitlines() if "the others wait for" in line]
        named = f"wait for rank {_HANGS} " in said[0] and "; and for" not in said[0] if said else False
        figures[f"{name}: said" if named else f"{name}: FAILED"] = said[0] if said else each.text[-1500:]
        figures[f"{name}: exit codes"] = str(each.codes)
    return figures


def judge_speed(ended: Mapping[str, Ended]) -> Figures:
    figures: Figures = {}
    for name, each in ended.items():
        try:
            found = _predicted(each.result()) if name.endswith(_PREDICTED) else _speed(each.result())
            figures |= {f"{name}: {key}": value for key, value in found.items()}
        except (RuntimeError, ValueError, TypeError) as error:
            figures[f"{name}: FAILED"] = str(error)
    return figures


def _speed(result: Figures) -> Figures:
    seconds = result["s_per_step"]
    parameters = result.get("parameters", {}).get("language", 1_205_000_000)
    flops = flops_of_step(LARGE, parameters)
    return {
        "parameters": result.get("parameters"),
        "ms per step": 1000 * seconds,
        "tokens/s": LARGE.batch * LARGE.length / seconds,
        "TFLOP/s": flops / seconds / 1e12,
        "MFU": flops / seconds / _PEAK_FLOPS,
        "logged": [f"{key} {value:.4g}" for key, value in sorted(result.get("logged", {}).items())],
        "peak GiB": result.get("peak_gib"),
        "reserved GiB": result.get("reserved_gib"),
        "host reads in a step": result["host_reads"],
        "loss": [result["losses"][0], result["losses"][-1]],
        "held between steps GiB": result.get("between_steps_gib"),
        "kernels": [f"{ms:.1f} ms, {calls} x {key[:90]}" for key, calls, ms in result["kernels"][:8]],
        "seconds in all": result.get("fit_s"),
    }


def _predicted(result: Figures) -> Figures:
    gib = {key: f"{value:.2f}" for key, value in result["gib"].items()}
    times = {f"ms per step {how}": 1000 * seconds for how, seconds in result["seconds"].items()}
    return {"peak GiB": result["gib"]["together"], "GiB": str(gib), **times, "rates": result["rates"]}


def judge_checkpoint(ended: Mapping[str, Ended]) -> Figures:
    return ended["checkpoint"].result()["checkpoint"]


def find_out(name: str, part: Part, directory: Path) -> Figures:
    """Run one part, in its time. What is wrong stands under a key with ``FAILED`` in it.

    Args:
        name: of the part, for its logs.
        part: what to run.
        directory: where the logs go.
    """
    began = time.monotonic()

    def start(item: tuple[str, Run]) -> tuple[str, Ended]:
        key, run = item
        log = re.sub(r"\W+", "_", f"{name}_{key}")
        return key, run_ranks(log, run, directory=directory, limit=part.limit)

    try:
        with ThreadPoolExecutor(max_workers=len(part.runs) if part.together else 1) as pool:
            ended = dict(pool.map(start, part.runs.items()))
        figures = part.judge(ended)
        ours = [each for key, each in ended.items() if part.runs[key].loop != "transformers"]
        if said := unexpected_warnings(log.read_text(errors="replace") for each in ours for log in each.logs):
            figures["warnings: FAILED"] = said
    except Exception as error:
        figures = {"FAILED": f"{type(error).__name__}: {error}"}
    return figures | {"seconds of this part": time.monotonic() - began}


def rehearsed(part: Part) -> Part:
    """The same on CPUs, with a model that is small everywhere."""
    small = {"hidden": 64, "layers": 2, "heads": 4, "vocabulary": 512, "length": 192, "batch": 4}
    runs = {name: replace(run, accelerator="cpu", **small) for name, run in part.runs.items()}
    return replace(part, runs=runs, together=False, limit=_REHEARSAL)


def parts(directory: Path) -> dict[str, Part]:
    """Name -> part, in the order in which they are to run.

    Args:
        directory: where there is room for a checkpoint.
    """
    mixed = replace(SMALL, precision="bf16-mixed")
    two = replace(SMALL, ranks=2)
    packed = replace(SMALL, pack_to=2 * SMALL.length)
    trained = {
        "trainer": LARGE,
        "trainer, Megatron's attention": replace(LARGE, attention="megatron"),
        "recomputed": replace(LARGE, recompute=True, profile=False),
    }
    return {
        "curve": Part(
            runs={
                "cpu": replace(SMALL, accelerator="cpu"),
                "gpu": SMALL,
                "bf16": mixed,
                "bf16-overlapped": replace(mixed, distributed=True),
                "recomputed": replace(mixed, distributed=True, recompute=True),
            },
            judge=judge_curve,
            limit=100,
        ),
        "attention": Part(runs={"attention": replace(SMALL, loop="attention")}, judge=judge_attention, limit=100),
        "evaluation": Part(
            runs={
                "evaluate": replace(SMALL, evaluate=True),
                "alone": replace(SMALL, loop="evaluation", evaluate=True),
                "alone, apart": replace(two, loop="evaluation", evaluate=True, colocate=False),
            },
            judge=judge_evaluation,
            limit=100,
        ),
        "packed": Part(
            runs={
                "cpu": replace(packed, accelerator="cpu"),
                "float32": packed,
                "bf16": replace(packed, precision="bf16-mixed", distributed=True),
                "dp2 balanced": replace(packed, ranks=2, modules={"images": {"dp": 2}, "language": {"dp": 2}}),
            },
            judge=judge_packed,
            limit=100,
        ),
        "ranks": Part(
            runs={
                "one": SMALL,
                "apart": replace(two, colocate=False),
                "dp2 colocated": replace(two, modules={"images": {"dp": 2}, "language": {"dp": 2}}),
                "tp2 colocated": replace(two, modules={"images": {"dp": 2}, "language": {"tp": 2, "dp": 1}}),
                "pipeline": replace(
                    SMALL,
                    ranks=3,
                    colocate=False,
                    microbatches=4,
                    precision="bf16-mixed",
                    distributed=True,
                    modules={"images": {"dp": 1}, "language": {"pp": 2, "dp": 1}},
                ),
            },
            judge=judge_ranks,
            limit=150,
        ),
        "hang": Part(
            runs={
                "apart": replace(two, colocate=False, hangs=_HANGS, timeout=25),
                "tp2": replace(two, modules={"images": {"tp": 2}, "language": {"tp": 2}}, hangs=_HANGS, timeout=25),
            },
            judge=judge_hang,
            limit=100,
        ),
        "communicators": Part(
            runs={
                "apart": replace(two, colocate=False, steps=2),
                "tp2 colocated": replace(two, modules={"images": {"dp": 2}, "language": {"tp": 2, "dp": 1}}, steps=2),
            },
            judge=judge_communicators,
            limit=60,
            together=False,
        ),
        "speed": Part(
            runs={
                "bare": replace(LARGE, loop="bare"),
                "transformers": replace(LARGE, loop="transformers"),
                **trained,
                **{name + _PREDICTED: replace(run, loop="predict") for name, run in trained.items()},
            },
            judge=judge_speed,
            limit=80,
            together=False,
        ),
        "checkpoint": Part(
            runs={"checkpoint": replace(LARGE, layers=4, profile=False, steps=10, checkpoint=str(directory))},
            judge=judge_checkpoint,
            limit=90,
            together=False,
        ),
    }
